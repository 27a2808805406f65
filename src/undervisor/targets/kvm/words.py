"""What a caller and the agent say to each other: frames over any stream of bytes.

A frame is one of `guest.probe.protocol`, its sequence is the job's number, its kind one of `Word`.

    caller  OPEN                                 START PIECE... RUN   DATA  ASK     STOP
    agent   FACTS (JSON, or what is the matter)                       DATA  ANSWER  ENDED (JSON)

One machine runs at a time, and many one after the other.  START ends the machine that runs.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from enum import IntEnum
from typing import Any, Final

from undervisor.arch.x86.boot import BootMode, BootState
from undervisor.errors import BadInput
from undervisor.guest.probe.protocol import Frame
from undervisor.targets import End, How

VERSION: Final = 1
PIECE: Final = 0x8000
"""Bytes in one frame, at most."""
_ADDRESS: Final = struct.Struct("<Q")
_QUESTION: Final = struct.Struct("<BB")
_JOBS: Final = 1 << 16


class Word(IntEnum):
    """What a frame is; none is a kind of the probe's own frames, which DATA carries."""

    OPEN = 0x20
    FACTS = 0x21
    START = 0x22
    PIECE = 0x23
    RUN = 0x24
    DATA = 0x25
    ASK = 0x26
    ANSWER = 0x27
    STOP = 0x28
    ENDED = 0x29


class Question(IntEnum):
    """What can be asked of a machine that runs."""

    NESTED_STATE = 0
    SET_NESTED_STATE = 1
    REGISTERS = 2
    SET_REGISTERS = 3


@dataclass(frozen=True, slots=True)
class Described:
    """A machine as it goes over the line; its RAM is zero but for the pieces that follow.

    `interrupt_every`: seconds after which each processor is interrupted from outside, again and
    again; 0: never.
    """

    cpus: int
    memory: int
    boot: BootState
    interrupt_every: float = 0.0

    def encode(self) -> bytes:
        """The bytes of a START frame."""
        data = asdict(self)
        data["boot"]["mode"] = self.boot.mode.name
        return json.dumps(data).encode()

    @classmethod
    def decode(cls, payload: bytes) -> Described:
        """The machine of a START frame."""
        data = json.loads(payload)
        boot = data["boot"]
        boot["mode"] = BootMode[boot["mode"]]
        boot["gdt"] = tuple(boot["gdt"]) if boot["gdt"] else None
        return cls(**data | {"boot": BootState(**boot)})


def say(word: Word, job: int, payload: bytes = b"") -> bytes:
    """A frame."""
    return Frame(word, job % _JOBS, payload).encode()


def say_data(job: int, data: bytes) -> Iterator[bytes]:
    """Serial data in as many frames as it needs."""
    for at in range(0, len(data), PIECE):
        yield say(Word.DATA, job, data[at : at + PIECE])


def say_pieces(job: int, pieces: Iterable[tuple[int, bytes]]) -> Iterator[bytes]:
    """What is in RAM at the start, as (gpa, bytes)."""
    for gpa, data in pieces:
        for at in range(0, len(data), PIECE):
            yield say(Word.PIECE, job, _ADDRESS.pack(gpa + at) + data[at : at + PIECE])


def piece(payload: bytes) -> tuple[int, bytes]:
    """The address and the bytes of a PIECE frame."""
    return _ADDRESS.unpack_from(payload)[0], payload[_ADDRESS.size :]


def ask(question: Question, cpu: int, data: bytes = b"") -> bytes:
    """The payload of an ASK frame."""
    return _QUESTION.pack(question, cpu) + data


def asked(payload: bytes) -> tuple[Question, int, bytes]:
    """Question, processor and data of an ASK frame."""
    question, cpu = _QUESTION.unpack_from(payload)
    return Question(question), cpu, payload[_QUESTION.size :]


def answer(data: bytes) -> bytes:
    """The payload of an ANSWER frame."""
    return b"\0" + data


def refusal(error: BadInput) -> bytes:
    """The payload of an ANSWER, or FACTS, frame that says why there is none."""
    return b"\1" + f"{error.message}\0{error.hint}".encode()


def answered(payload: bytes) -> bytes:
    """What an ANSWER frame holds; BadInput where the agent refused."""
    if payload[:1] == b"\0":
        return payload[1:]
    message, _, hint = payload[1:].decode(errors="replace").partition("\0")
    raise BadInput(message or "the agent gave no answer", hint=hint)


def end_words(end: End, status: int | None = None) -> bytes:
    """The payload of an ENDED frame.

    `status` is that of a machine's process that died, in the convention of `Popen`.
    """
    data: dict[str, Any] = {field.name: getattr(end, field.name) for field in fields(end)}
    return json.dumps(data | {"how": end.how.name, "process": status}).encode()


def ended(payload: bytes) -> tuple[End, int | None]:
    """The end, and the status of the process where it died."""
    data = json.loads(payload)
    status = data.pop("process")
    return End(**data | {"how": How[data["how"]]}), status
