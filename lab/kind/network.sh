#!/bin/bash
# The network of pods, instead of kindnetd's, whose modules cannot be had: on each node, as kindnetd does it, a config of
# the plugins ptp, host-local and portmap with the node's part of the pods' network, and routes to the other nodes' parts.
set -euo pipefail

config=/etc/cni/net.d/10-kindnet.conflist

kubectl --kubeconfig /etc/kubernetes/kubelet.conf get nodes --watch --no-headers \
    -o custom-columns=:.metadata.name,:.spec.podCIDR,:.status.addresses[0].address |
    while read -r name subnet address; do
        [[ $subnet == */* && $address == *.*.*.* ]] || continue
        if [[ $name != "$(hostname)" ]]; then
            ip route replace "$subnet" via "$address"
        elif [[ ! -e $config ]]; then
            cat >"$config.part" <<EOF
{"cniVersion": "0.3.1", "name": "kindnet", "plugins": [
  {"type": "ptp", "ipMasq": false, "mtu": 1500, "ipam": {"type": "host-local", "dataDir": "/run/cni-ipam-state",
   "routes": [{"dst": "0.0.0.0/0"}], "ranges": [[{"subnet": "$subnet"}]]}},
  {"type": "portmap", "capabilities": {"portMappings": true}}]}
EOF
            mv "$config.part" "$config"
        fi
    done
