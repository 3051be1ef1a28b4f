"""What a macvtap may sit on besides the source itself: a virtual function, a VLAN device, a NIC's offloaded queues."""
