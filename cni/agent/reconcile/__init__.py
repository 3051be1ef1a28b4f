"""The reconciler: ends attachments that no runtime will end, and repairs what a kill left. GC, without a runtime's GC.

It runs when the agent starts, when a network namespace that the host's knows dies (RTM_DELNSID), and at intervals. What
it does with an attachment whose lock is free, decided again under the lock:

    record                    link                      network namespace      action
    of an ADD that was killed any                       any                    ended
    of a finished ADD         exists, with its alias    in use                 none
    of a finished ADD         gone                      its path leads to it   reported as lost: the runtime's to DEL
    of a finished ADD         gone                      dead, or not found     ended, with the delegate's DEL
    none                      macvtap, vmtap's alias,   has a path             adopted: a record is made from the link
                              index as ADD assigns it;
                              a device's index only if
                              the kubelet allocated it
    none                      macvtap whose lower       any                    none: another node's, whose network
                              device is not the host's                         namespace this one has an id for
    none                      any other with vmtap's    any                    left alone and reported: DEL finds it
                              alias                                            by the alias

A link in a pod is not removed for want of a record: no kill leaves it so, only the loss of the state folder, and a
guest may be using the link. An adopted record has no delegate; the runtime's DEL names it.
Leftovers without a record are removed: interface indexes, half-written records, device nodes, the host's end of a
bridge port whose tap is gone, VLAN devices without a macvtap. DELs that the shim left in pending/ are carried out.
Must not wait for an attachment's lock: its holder is a request, which takes care of the attachment.
"""
