"""The probe: a tiny bare-metal L1 that does what Python asks over a serial line."""
