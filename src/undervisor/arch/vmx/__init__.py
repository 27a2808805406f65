"""Intel VMX as the SDM writes it, volume 3C and the appendices of 3D."""
