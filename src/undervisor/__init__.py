"""Undervisor: the hypervisor under your hypervisor."""

__version__ = "0.1.0"
