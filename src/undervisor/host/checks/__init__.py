"""Checks: facts in, findings out; nothing here reads a machine or changes one."""
