"""Facts about a machine: what was read and how, without judgement; `machine.gather` reads all."""
