#!/usr/bin/python
"""Ansible module: `undervisor check` of one machine."""

from __future__ import annotations

import json
import subprocess

from ansible.module_utils.basic import AnsibleModule

DOCUMENTATION = r"""
module: undervisor_check
short_description: Say which layer keeps nested KVM from working
description:
  - Runs C(undervisor check) where the task runs and returns its findings.
  - Changes nothing, in check mode and out of it.
options:
  executable:
    description: The command, or the path of the command.
    type: str
    default: undervisor
  host:
    description:
      - A machine to read over SSH from where the task runs, as user@name.
      - Use it with C(delegate_to) where undervisor is not installed on the machine itself.
    type: str
  recording:
    description: A folder that C(undervisor record) made.
    type: path
  ssh_config:
    description: An ssh configuration file for O(host).
    type: path
  security:
    description: Also known vulnerabilities and hardening.
    type: bool
    default: false
  require:
    description: Fail unless nested KVM is usable, or unless nothing failed at all.
    type: str
    choices: [nothing, usable, no-failures]
    default: nothing
  timeout:
    description: Seconds after which the check is given up.
    type: int
    default: 300
author:
  - The Undervisor authors
"""

EXAMPLES = r"""
- name: Fail where nested guests would not have KVM
  undervisor.nested.undervisor_check:
    require: usable

- name: Look at a machine on which nothing is installed
  undervisor.nested.undervisor_check:
    host: "{{ ansible_user }}@{{ ansible_host }}"
    security: true
  delegate_to: localhost
"""

RETURN = r"""
verdict:
  description: usable, not-usable or unknown.
  type: str
  returned: success
cause:
  description: The id of the finding to remedy first.
  type: str
  returned: success
findings:
  description: All findings with id, layer, level, title, evidence and remedy.
  type: list
  elements: dict
  returned: success
below:
  description: What is below the machine.
  type: str
  returned: success
"""


def command(parameters):
    """The argument vector for the module's parameters."""
    words = [parameters["executable"], "check", "--json"]
    for name in ("host", "recording", "ssh_config"):
        if parameters[name]:
            words += ["--" + name.replace("_", "-"), parameters[name]]
    if parameters["security"]:
        words.append("--security")
    return words


def failure(said, require):
    """Why the requirement is not met; empty where it is."""
    if require == "usable" and said["verdict"] != "usable":
        causes = [f for f in said["findings"] if f["id"] == said["cause"]]
        told = causes[0] if causes else {"title": "unknown", "id": "", "remedy": ""}
        return f"nested KVM is {said['verdict']}: {told['title']} [{told['id']}]; {told['remedy']}"
    failed = [f["id"] for f in said["findings"] if f["level"] == "fail"]
    if require == "no-failures" and failed:
        return "failed: " + ", ".join(failed)
    return ""


def main():
    """Run the check and hand its JSON on."""
    module = AnsibleModule(
        argument_spec={
            "executable": {"type": "str", "default": "undervisor"},
            "host": {"type": "str"},
            "recording": {"type": "path"},
            "ssh_config": {"type": "path"},
            "security": {"type": "bool", "default": False},
            "require": {
                "type": "str",
                "choices": ["nothing", "usable", "no-failures"],
                "default": "nothing",
            },
            "timeout": {"type": "int", "default": 300},
        },
        mutually_exclusive=[("host", "recording")],
        supports_check_mode=True,
    )
    words = command(module.params)
    try:
        done = subprocess.run(
            words, capture_output=True, text=True, timeout=module.params["timeout"], check=False
        )
    except FileNotFoundError:
        module.fail_json(msg=f"{words[0]} is not installed here; use host= with delegate_to")
    except subprocess.TimeoutExpired:
        module.fail_json(msg=f"no answer within {module.params['timeout']} s")
    try:
        said = json.loads(done.stdout)
    except ValueError:
        module.fail_json(msg=done.stderr.strip() or "undervisor said nothing", rc=done.returncode)
    why = failure(said, module.params["require"])
    if why:
        module.fail_json(msg=why, **said)
    module.exit_json(changed=False, **said)


if __name__ == "__main__":
    main()
