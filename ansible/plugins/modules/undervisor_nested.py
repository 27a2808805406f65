#!/usr/bin/python
"""Ansible module: `undervisor enable` and `undervisor disable`."""

from __future__ import annotations

import json
import subprocess

from ansible.module_utils.basic import AnsibleModule

DOCUMENTATION = r"""
module: undervisor_nested
short_description: Switch nested KVM on or off, now and for good
description:
  - Runs C(undervisor enable) or C(undervisor disable) on the machine, after its plan was read.
  - Idempotent. In check mode only the plan is made; with C(--diff) the files are shown.
options:
  state:
    description: The wanted state; V(undone) takes back what was changed before.
    type: str
    choices: [enabled, disabled, undone]
    default: enabled
  later:
    description: Only the configuration; leave the loaded module alone.
    type: bool
    default: false
  root:
    description: Another system's root folder.
    type: path
  executable:
    description: The command, or the path of the command.
    type: str
    default: undervisor
author:
  - The Undervisor authors
"""

EXAMPLES = r"""
- name: Nesting on, after the last guest was moved away
  undervisor.nested.undervisor_nested:
    state: enabled
  become: true
"""

RETURN = r"""
steps:
  description: What was done, or would be done.
  type: list
  elements: str
  returned: always
restart:
  description: Why a restart is needed, empty where none is.
  type: str
  returned: always
"""


def command(parameters):
    """The argument vector without --dry-run and --yes."""
    verb = "disable" if parameters["state"] == "disabled" else "enable"
    words = [parameters["executable"], verb]
    if parameters["state"] == "undone":
        words.append("--undo")
    if parameters["later"]:
        words.append("--later")
    if parameters["root"]:
        words += ["--root", parameters["root"]]
    return words


def run(module, words):
    """Run it; its exit code, output and errors."""
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=1800, check=False)
    except FileNotFoundError:
        module.fail_json(msg=f"{words[0]} is not installed here")
    except subprocess.TimeoutExpired:
        module.fail_json(msg=f"{' '.join(words)} did not end within half an hour")
    return done


def plan(module, words):
    """The plan as undervisor prints it."""
    done = run(module, [*words, "--dry-run", "--json"])
    try:
        return json.loads(done.stdout)
    except ValueError:
        module.fail_json(msg=done.stderr.strip() or "undervisor said nothing", rc=done.returncode)


def main():
    """Plan, then apply where something is to do."""
    module = AnsibleModule(
        argument_spec={
            "state": {
                "type": "str",
                "choices": ["enabled", "disabled", "undone"],
                "default": "enabled",
            },
            "later": {"type": "bool", "default": False},
            "root": {"type": "path"},
            "executable": {"type": "str", "default": "undervisor"},
        },
        supports_check_mode=True,
    )
    words = command(module.params)
    said = plan(module, words)
    steps = [f"{'change' if c['before'] else 'write'} {c['path']}" for c in said["changes"]]
    steps += ["run " + " ".join(c["argv"]) for c in said["commands"]]
    result = {
        "changed": bool(steps),
        "steps": steps,
        "restart": said["restart"],
        "diff": [
            {"before_header": c["path"], "after_header": c["path"],
             "before": c["before"] or "", "after": c["after"] or ""}
            for c in said["changes"]
        ],
    }  # fmt: skip
    if said["refusal"]:
        module.fail_json(msg=said["refusal"], **{**result, "changed": False})
    if steps and not module.check_mode:
        done = run(module, [*words, "--yes"])
        if done.returncode:
            module.fail_json(msg=done.stderr.strip() or done.stdout.strip(), **result)
    module.exit_json(**result)


if __name__ == "__main__":
    main()
