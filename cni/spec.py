"""The CNI specification's numbers and names (SPEC.md of containernetworking/cni, version 1.1.0).

Constants only; nothing here may import anything.
"""

VERSIONS = ("0.1.0", "0.2.0", "0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0")
"""Every version this plugin answers in, oldest first."""

# Error codes, SPEC section 5 "Error".
INCOMPATIBLE_VERSION = 1
UNSUPPORTED_FIELD = 2
UNKNOWN_CONTAINER = 3
INVALID_ENVIRONMENT = 4
IO_FAILURE = 5
DECODING_FAILURE = 6
INVALID_NETWORK_CONFIG = 7
INVALID_NETNS = 8  # libcni's types.ErrInvalidNetNS
TRY_AGAIN_LATER = 11
PLUGIN_NOT_AVAILABLE = 50
PLUGIN_NOT_AVAILABLE_LIMITED = 51

# Ours, from 100 (docs/operations.md lists them with what to do).
KERNEL_REFUSED = 100
NAME_IN_USE = 101
SOURCE_BUSY = 102
MAC_IN_USE = 103
SOURCE_MISSING = 104
NO_ATTACHMENT = 105
DEVICE_BUSY = 106
WRONG_DEVICE = 107
CHECK_FAILED = 108
DELEGATE_FAILED = 109
INTERNAL = 199
