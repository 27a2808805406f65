"""Imported by a process whose forks run machines: what can be done once is done here."""

from undervisor.silicon.glue import machine_code

machine_code()
