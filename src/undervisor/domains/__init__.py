"""Guest definitions: one model, to and from libvirt XML and to a QEMU command line."""
