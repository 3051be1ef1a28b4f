"""Wait until a DaemonSet's pods are ready on all of its nodes. Arguments: namespace, name. Needs `get` on it."""

import json
import os
import ssl
import sys
import time
import urllib.request

ACCOUNT = "/var/run/secrets/kubernetes.io/serviceaccount"
namespace, name = sys.argv[1:]
# The API server's address, as in-cluster clients use it: DNS may not work while a cluster is removed.
host, port = os.environ["KUBERNETES_SERVICE_HOST"], os.environ["KUBERNETES_SERVICE_PORT"]
host = f"[{host}]" if ":" in host else host
url = f"https://{host}:{port}/apis/apps/v1/namespaces/{namespace}/daemonsets/{name}"
trusted = ssl.create_default_context(cafile=f"{ACCOUNT}/ca.crt")
printed = ""
while True:  # the job has a deadline
    with open(f"{ACCOUNT}/token") as file:
        request = urllib.request.Request(url, headers={"Authorization": f"Bearer {file.read()}"})
    with urllib.request.urlopen(request, context=trusted, timeout=30) as answer:
        found = json.load(answer)
    status = found["status"]
    wanted, ready = status.get("desiredNumberScheduled", 0), status.get("numberReady", 0)
    if f"{ready} of {wanted} nodes are done" != printed:
        printed = f"{ready} of {wanted} nodes are done"
        print(printed, flush=True)
    if status.get("observedGeneration") == found["metadata"]["generation"] and ready >= wanted:
        break
    time.sleep(1)
