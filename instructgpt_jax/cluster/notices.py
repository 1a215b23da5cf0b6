"""The notice of Compute Engine that this machine will be taken, seconds before it is: the other way than a signal.

A Spot VM gets half a minute. Its metadata server then has `instance/preempted` TRUE, or before a repair of the host
`instance/maintenance-event` TERMINATE_ON_HOST_MAINTENANCE (cloud.google.com/compute/docs, "Spot VMs" and "Monitor and
plan for a host maintenance event"). Kubernetes and the ends of `launch/` send SIGTERM, which process.py catches.
"""

import http.client
import os
import pathlib
import threading
import urllib.request
from collections.abc import Callable

EVERY = 3.0  # seconds between questions
_VENDOR = pathlib.Path("/sys/class/dmi/id/product_name")
_NOTICES = {"preempted": "TRUE", "maintenance-event": "TERMINATE_ON_HOST_MAINTENANCE"}


def server() -> str:
    """Where the metadata server is, '' on a machine that has none; GCE_METADATA_HOST as Google's libraries read it."""
    try:
        ours = _VENDOR.read_text().startswith("Google")
    except OSError:
        ours = False
    return os.environ.get("GCE_METADATA_HOST", "") or ("metadata.google.internal" if ours else "")


def watch(host: str, tell: Callable[[str], None], over: threading.Event) -> None:
    """Asks until a notice comes, and then calls `tell` once with its words; ends when `over` is set."""
    while not over.wait(EVERY):
        for name, wanted in _NOTICES.items():
            if _ask(host, name) == wanted:
                tell(f"{name}: {wanted}")
                return


def _ask(host: str, name: str) -> str:
    address = f"http://{host}/computeMetadata/v1/instance/{name}"
    request = urllib.request.Request(address, headers={"Metadata-Flavor": "Google"})
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=2) as answer:
            return answer.read().decode("utf-8", "replace").strip()
    except (OSError, http.client.HTTPException):  # it restarts with its machine, and is no reason to end
        return ""
