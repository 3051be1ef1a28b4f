"""The reconciler: ends what no runtime will ever end, and makes whole what a kill left; GC for where no GC comes.

It runs when the agent starts, when a namespace that the host's knows dies (RTM_DELNSID), and at intervals. What it does
with an attachment that nobody is working on (its lock is free; it is looked at again inside the lock):

    record                    link                    the namespace            →
    its ADD was killed        whatever there is       any                      ended
    its ADD came to its end   there, with its alias   any                      in use: nothing
    its ADD came to its end   gone                    its path leads to it     lost: reported; DEL is the runtime's
    its ADD came to its end   gone                    dead, or not to be found ended, with the delegate's DEL
    none                      macvtap, alias ours,    has a path               adopted: a record is made from the
                              index as ADD gives it                            link
    none                      any other of ours       any                      left alone and reported: DEL knows
                                                                               it by its alias

A link in a pod is never removed for want of a record: no kill can leave one so, only a lost state folder, and then
a guest may be using it. An adopted record knows no delegate; the runtime's DEL tells it.
Leftovers that no record speaks of are removed: interface indexes, half-written records, device nodes, the host's end of
a bridge port whose tap is gone, VLAN devices without a macvtap. DELs that the shim left in pending/ are carried out.
Must not wait for a lock: who holds it is a request, and sees to the attachment itself.
"""
