{{/* The labels of the selectors. A selector is immutable, so they must never change. */}}
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

{{/* The objects of a release named vmtap have the names of the kustomization's. */}}
{{- define "vmtap.name" -}}
{{ if contains "vmtap" .Release.Name }}{{ .Release.Name | trunc 40 | trimSuffix "-" }}{{ else }}{{ .Release.Name | trunc 34 | trimSuffix "-" }}-vmtap{{ end }}
{{- end }}

{{- define "vmtap.image" -}}
{{ .Values.image.repository }}{{ if .Values.image.digest }}@{{ .Values.image.digest }}{{ else }}:{{ .Values.image.tag | default .Chart.AppVersion }}{{ end }}
{{- end }}

{{- define "vmtap.podResources" -}}
{{ .Values.devicePlugin.podResourcesDir | default (printf "%s/pod-resources" (dir .Values.devicePlugin.kubeletDir)) }}
{{- end }}

{{/* Whether the agent writes CDI specs: not empty. */}}
{{- define "vmtap.usesCdi" -}}
{{ if or (eq .Values.devicePlugin.route "cdi") .Values.dra.enabled }}yes{{ end }}
{{- end }}

{{/* vmtapd's configuration file, without the address of the metrics: only the pod knows the node's address. */}}
{{- define "vmtap.agent" -}}
devicePlugin: true
resourceNamespace: {{ .Values.devicePlugin.resourceNamespace }}
kubelet: {{ .Values.devicePlugin.kubeletDir }}
podResources: {{ include "vmtap.podResources" . }}
deviceRoute: {{ .Values.devicePlugin.route }}
cdi: {{ .Values.devicePlugin.cdiDir }}
brokerMount: {{ .Values.broker.enabled }}
attachmentMetrics: {{ .Values.metrics.attachments }}
health: 127.0.0.1:{{ .Values.health.port }}
cgroup: /sys/fs/cgroup
logLevel: {{ .Values.agent.logLevel }}
drainSeconds: {{ .Values.agent.drainSeconds }}
reconcileSeconds: {{ .Values.agent.reconcileSeconds }}
delegateSeconds: {{ .Values.agent.delegateSeconds }}
{{- end }}

{{- define "vmtap.policy" -}}
interfaces: {{ if .Values.interfaces }}{{ toYaml .Values.interfaces | nindent 2 }}{{ else }}[]{{ end }}
allowUnlisted: {{ .Values.allowUnlisted }}
{{- with include "vmtap.macSeed" . }}
macSeed: {{ . | quote }}
{{- end }}
{{- with .Values.macPrefix }}
macPrefix: {{ . | quote }}
{{- end }}
{{- with .Values.mac }}
mac: {{ toJson . }}
{{- end }}
{{- if not (kindIs "invalid" .Values.ipamTypes) }}
ipamTypes: {{ toJson .Values.ipamTypes }}
{{- end }}
{{- end }}

{{/* The SELinux options; {} if there are none. */}}
{{- define "vmtap.selinux" -}}
{{ .Values.agent.seLinuxOptions | default (.Values.openshift.enabled | ternary (dict "type" "spc_t") dict) | toYaml }}
{{- end }}

{{/* User 0 without capabilities: it can write files that user 0 owns. */}}
{{- define "vmtap.powerless" -}}
runAsUser: 0
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: {drop: [ALL]}
{{- end }}

{{/* A pod that removes the shim and the state from its node, and then stays, so that its readiness shows the end. */}}
{{- define "vmtap.uninstalls" -}}
serviceAccountName: {{ include "vmtap.name" . }}-uninstall
automountServiceAccountToken: false
enableServiceLinks: false
hostNetwork: true # records have the ids by which the host's namespace knows the pods'
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
        add: [NET_ADMIN] # to check whether a pod's link exists
    volumeMounts:
      - {name: bin, mountPath: {{ .Values.cni.binDir }}}
      # The parent of the state folder, so that the state folder can be removed.
      - {name: run, mountPath: /host/run}
      # The driver of resource claims has a folder of its own in the first, and a socket in the second.
      - {name: plugins, mountPath: /var/lib/kubelet/plugins}
      - {name: plugins-registry, mountPath: /var/lib/kubelet/plugins_registry}
      - {name: cdi, mountPath: /var/run/cdi}
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
  - {name: plugins, hostPath: {path: {{ dir .Values.devicePlugin.kubeletDir }}/plugins, type: DirectoryOrCreate}}
  - {name: plugins-registry, hostPath: {path: {{ dir .Values.devicePlugin.kubeletDir }}/plugins_registry, type: DirectoryOrCreate}}
  - {name: cdi, hostPath: {path: {{ .Values.devicePlugin.cdiDir }}, type: DirectoryOrCreate}}
{{- end }}

{{- /* The seed of derived MACs: the value, else the UID of kube-system where a cluster can be asked (not by helm template). */ -}}
{{- define "vmtap.macSeed" -}}
{{- if .Values.macSeed }}{{ .Values.macSeed }}{{ else }}{{ dig "metadata" "uid" "" (lookup "v1" "Namespace" "" "kube-system") }}{{ end -}}
{{- end -}}
