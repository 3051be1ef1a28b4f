{{/* What every object is found by; of a selector, so that it may never change. */}}
{{- define "vmtap.selector" -}}
app.kubernetes.io/name: vmtap
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "vmtap.labels" -}}
{{ include "vmtap.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ .Chart.Name }}-{{ .Chart.Version }}
{{- end }}

{{/* One release on a cluster is the rule: its objects are called as the kustomization's. */}}
{{- define "vmtap.name" -}}
{{ if contains "vmtap" .Release.Name }}{{ .Release.Name | trunc 40 | trimSuffix "-" }}{{ else }}{{ .Release.Name | trunc 34 | trimSuffix "-" }}-vmtap{{ end }}
{{- end }}

{{- define "vmtap.image" -}}
{{ .Values.image.repository }}{{ if .Values.image.digest }}@{{ .Values.image.digest }}{{ else }}:{{ .Values.image.tag | default .Chart.AppVersion }}{{ end }}
{{- end }}

{{/* vmtapd's file. Where metrics are served is not in it: the node's address is only known there. */}}
{{- define "vmtap.agent" -}}
devicePlugin: true
resourceNamespace: {{ .Values.devicePlugin.resourceNamespace }}
kubelet: {{ .Values.devicePlugin.kubeletDir }}
deviceRoute: {{ .Values.devicePlugin.route }}
cdi: {{ .Values.devicePlugin.cdiDir }}
brokerMount: {{ .Values.broker.enabled }}
logLevel: {{ .Values.agent.logLevel }}
drainSeconds: {{ .Values.agent.drainSeconds }}
reconcileSeconds: {{ .Values.agent.reconcileSeconds }}
delegateSeconds: {{ .Values.agent.delegateSeconds }}
{{- end }}

{{- define "vmtap.policy" -}}
interfaces: {{ if .Values.interfaces }}{{ toYaml .Values.interfaces | nindent 2 }}{{ else }}[]{{ end }}
allowUnlisted: {{ .Values.allowUnlisted }}
{{- end }}

{{/* {} where there are none. */}}
{{- define "vmtap.selinux" -}}
{{ .Values.agent.seLinuxOptions | default (.Values.openshift.enabled | ternary (dict "type" "spc_t") dict) | toYaml }}
{{- end }}

{{/* A root without powers: it may write where root may, and that is all. */}}
{{- define "vmtap.powerless" -}}
runAsUser: 0
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: {drop: [ALL]}
{{- end }}

{{/* A pod that takes the shim and the state away from its node, and then stays so that it can be seen to be done. */}}
{{- define "vmtap.uninstalls" -}}
serviceAccountName: {{ include "vmtap.name" . }}-uninstall
automountServiceAccountToken: false
enableServiceLinks: false
hostNetwork: true # links in the pods are known by the host's ids of their namespaces
dnsPolicy: Default
{{- with .Values.imagePullSecrets }}
imagePullSecrets: {{- toYaml . | nindent 2 }}
{{- end }}
terminationGracePeriodSeconds: 1
tolerations: {{- toYaml .Values.agent.tolerations | nindent 2 }}
nodeSelector: {{- toYaml .Values.agent.nodeSelector | nindent 2 }}
securityContext:
  seccompProfile: {type: RuntimeDefault}
  {{- with (include "vmtap.selinux" . | fromYaml) }}
  seLinuxOptions: {{- toYaml . | nindent 4 }}
  {{- end }}
initContainers:
  - name: uninstall
    image: {{ include "vmtap.image" . }}
    imagePullPolicy: {{ .Values.image.pullPolicy }}
    command: [vmtapctl, uninstall, --bin-dir, {{ .Values.cni.binDir }}, --state, --run, /host/run/vmtap]
    resources: {requests: {cpu: 10m, memory: 32Mi}}
    securityContext:
      runAsUser: 0
      allowPrivilegeEscalation: false
      readOnlyRootFilesystem: true
      capabilities:
        drop: [ALL]
        add: [NET_ADMIN] # to see whether a pod's link is there still
    volumeMounts:
      - {name: bin, mountPath: {{ .Values.cni.binDir }}}
      # The folder above the state's, so that that can go as well.
      - {name: run, mountPath: /host/run}
      {{- if eq .Values.devicePlugin.route "cdi" }}
      - {name: cdi, mountPath: /var/run/cdi}
      {{- end }}
containers:
  - name: done
    image: {{ include "vmtap.image" . }}
    imagePullPolicy: {{ .Values.image.pullPolicy }}
    command: [sleep, infinity]
    resources: {requests: {cpu: 1m, memory: 8Mi}}
    securityContext:
      runAsNonRoot: true
      runAsUser: 65534
      allowPrivilegeEscalation: false
      readOnlyRootFilesystem: true
      capabilities: {drop: [ALL]}
volumes:
  - {name: bin, hostPath: {path: {{ .Values.cni.binDir }}, type: DirectoryOrCreate}}
  - {name: run, hostPath: {path: /run, type: Directory}}
  {{- if eq .Values.devicePlugin.route "cdi" }}
  - {name: cdi, hostPath: {path: {{ .Values.devicePlugin.cdiDir }}, type: DirectoryOrCreate}}
  {{- end }}
{{- end }}
