"""`undervisor shell` from outside: a script, one command, a terminal."""

import os
import pty
import re
import select
import signal
import subprocess
import sys
import time

import pytest

from undervisor.errors import BadInput, ExitCode, GuestDied
from undervisor.shell.console import run_script

LIMIT = 60
COMMAND = [sys.executable, "-m", "undervisor", "shell"]


def shell(*words, stdin=""):
    return subprocess.run(
        [*COMMAND, *words], input=stdin, capture_output=True, text=True, timeout=LIMIT, check=False
    )


def test_a_script_on_standard_input_shows_values_without_a_prompt():
    script = """
vmx.on()
l2("mov $5, %eax; vmcall")
exit = vmx.launch(rbx=41)
exit.reason.name
for number in (1, 2):
    number * 2
assert regs.rax == 5
"""
    done = shell(stdin=script)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    assert lines[0].startswith("VMX operation;")
    assert lines[2:] == ["'VMCALL'", "2", "4"]


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--cpu", "amd", "-c", "svm.on(); svm.run().code.name"], 0, ""),
        (["-c", "svm.on()"], 1, "this processor has no SVM"),
        (["-c", "call('mov %rax, %cr3', rax=1 << 26)"], 4, "the machine is dead: triple fault"),
        (["--timeout", "0.5", "-c", "vmx.on(); l2('jmp .'); vmx.launch()"], 6, "no answer in 0.5"),
        (["--on", "nothing"], 2, "there is no target 'nothing'"),
        (["--cpus", "9"], 2, "--cpus 9"),
        (["--timeout", "0"], 2, "--timeout 0"),
    ],
)
def test_a_command_ends_with_an_exit_code(words, code, message):
    done = shell(*words)
    assert done.returncode == code, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr


# -- scripts, without a machine ----------------------------------------------------------------


def test_a_statement_that_raises_ends_the_script_and_is_told_with_its_line(capsys):
    assert run_script("x = 1\nassert x == 2, 'no'\nprint('on')", {}, "stdin") == ExitCode.NEGATIVE
    out, err = capsys.readouterr()
    assert (out, err) == ("", "stdin, line 2: AssertionError: no\n")


def test_the_line_is_that_of_the_function_that_raised(capsys):
    source = "def f():\n    x = 0\n    return 1 / x\n\nf()\n"
    assert run_script(source, {}, "stdin") == ExitCode.NEGATIVE
    assert capsys.readouterr().err == "stdin, line 3: ZeroDivisionError: division by zero\n"


@pytest.mark.parametrize(
    ("source", "message"),
    [("a\nb = = 1", r"stdin, line 2: invalid syntax"), ("\0", r"stdin.*null bytes")],
)
def test_what_is_no_python_is_bad_input(source, message):
    with pytest.raises(BadInput, match=message):
        run_script(source, {}, "stdin")


@pytest.mark.parametrize(
    ("source", "code"), [("exit()", 0), ("exit(7)", 7), ("exit('bad')", 1), ("", 0)]
)
def test_exit_ends_a_script_as_in_python(source, code):
    names = {"exit": sys.exit}
    assert run_script(source, names, "stdin") == code


def test_a_failure_of_the_machine_passes():
    def die():
        raise GuestDied("dead")

    with pytest.raises(GuestDied):
        run_script("die()", {"die": die}, "stdin")


# -- a terminal --------------------------------------------------------------------------------


class Terminal:
    """The shell on a terminal of its own."""

    def __init__(self, home):
        self.pid, self.line = pty.fork()
        if self.pid == 0:
            os.environ |= {"XDG_STATE_HOME": str(home), "TERM": "dumb"}
            os.execv(COMMAND[0], COMMAND)
        self.text = ""

    def until(self, words):
        """What is printed up to a pattern."""
        deadline = time.monotonic() + LIMIT
        while not (found := re.search(words, self.text)):
            left = deadline - time.monotonic()
            ready, _, _ = select.select([self.line], [], [], max(0.0, left))
            assert ready, f"{words!r} did not come:\n{self.text}"
            try:
                self.text += os.read(self.line, 4096).decode(errors="replace")
            except OSError:
                raise AssertionError(f"it ended without {words!r}:\n{self.text}") from None
        before, self.text = self.text[: found.end()], self.text[found.end() :]
        return before

    def type(self, text):
        os.write(self.line, text.encode())

    def end(self):
        self.type("\x04")
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


@pytest.fixture
def terminal(tmp_path):
    made = Terminal(tmp_path)
    yield made
    os.close(made.line)
    try:
        os.kill(made.pid, signal.SIGKILL)
        os.waitpid(made.pid, 0)
    except (ProcessLookupError, ChildProcessError):
        pass


def test_the_prompt_completes_tells_failures_in_one_message_and_keeps_history(terminal, tmp_path):
    assert "GenuineIntel, 1 processor" in terminal.until(">>> ")
    terminal.type("vmx.on()\n")
    assert "VMX operation" in terminal.until("\n>>> ")
    terminal.type("vmcs.guest_ri\t")
    terminal.until(r"vmcs\.guest_rip")
    terminal.type("\n")
    assert terminal.until("\n>>> ").split()[0] == "0x608000"
    terminal.type("vmcs.guest_gdtr_\t\t")
    terminal.until(r"vmcs\.guest_gdtr_base\s+vmcs\.guest_gdtr_limit")
    terminal.type("limit\n")
    terminal.until(r"\n0x0\s+>>> ")
    terminal.type("svm.on()\n")
    said = terminal.until("\n>>> ")
    assert "this processor has no SVM" in said
    assert "Traceback" not in said
    terminal.type("call('mov %rax, %cr3', rax=1 << 26)\n")
    assert "the machine is dead: triple fault" in terminal.until("\n>>> ")
    terminal.type("reboot()\n")
    assert "started anew" in terminal.until("\n>>> ")
    terminal.type("1/0\n")
    assert "ZeroDivisionError" in terminal.until("\n>>> ")
    assert terminal.end() == 0
    lines = (tmp_path / "undervisor" / "shell_history").read_text().splitlines()
    assert lines[:2] == ["vmx.on()", "vmcs.guest_rip"]


def test_ctrl_c_ends_a_statement_and_not_the_prompt(terminal):
    terminal.until(">>> ")
    terminal.type("vmx.on(); l2('jmp .'); vmx.launch()\n")
    terminal.until("GUEST_RSP are set")
    time.sleep(0.3)
    terminal.type("\x03")
    assert "interrupted; if the machine does not answer" in terminal.until("\n>>> ")
    terminal.type("reboot()\n")
    assert "started anew" in terminal.until("\n>>> ")
    assert terminal.end() == 0
