#!/bin/sh
# Before a kubelet starts: files of /proc/sys that it sets, and that belong to no namespace, are covered by files with
# its values. The host's kernel is not changed.
set -eu
mkdir -p /run/covered
while read -r name value; do
    cover=/run/covered/${name##*/}
    [ -e "$cover" ] && continue
    echo "$value" >"$cover"
    mount --bind "$cover" "/proc/sys/$name"
done <<EOF
vm/overcommit_memory 1
vm/panic_on_oom 0
kernel/panic 10
kernel/panic_on_oops 1
kernel/keys/root_maxkeys 1000000
kernel/keys/root_maxbytes 25000000
EOF
