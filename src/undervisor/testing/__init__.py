"""Tests of other people's hypervisors: a machine in a child process, expectations, reports.

`undervisor.pytest_plugin` is the way in; `docs/test-your-hypervisor.md` the guide.
"""
