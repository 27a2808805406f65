import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from undervisor.domains.libvirt_xml import DomainXml
from undervisor.domains.network import from_xml
from undervisor.domains.safe_xml import SIZE_LIMIT, parse
from undervisor.errors import BadInput

GOOD = "<domain type='kvm'><name>a</name><memory>4194304</memory></domain>"
BOMB = (
    "<!DOCTYPE d [<!ENTITY a 'aaaaaaaaaa'>"
    + "".join(f"<!ENTITY {c} '{('&' + chr(ord(c) - 1) + ';') * 10}'>" for c in "bcdefghij")
    + "]><domain type='kvm'><name>&j;</name><memory>1</memory></domain>"
)


def domain(inner):
    return f"<domain type='kvm'><name>a</name><memory>1</memory>{inner}</domain>"


@pytest.mark.parametrize(
    ("raw", "word"),
    [
        (BOMB, "document type"),
        ("<?xml version='1.0'?>\n<!-- x -->\n" + BOMB, "document type"),
        ("<?x y?>  \n<!---->" + BOMB, "document type"),
        ("<!DOCTYPE d SYSTEM 'file:///etc/passwd'>" + GOOD, "document type"),
        ("<!DOCTYPE d [<!ENTITY x SYSTEM 'file:///etc/passwd'>]><domain>&x;</domain>", "document"),
        (domain("<x>&undeclared;</x>"), "well-formed"),
        (GOOD.encode("utf-16"), "not UTF-8"),
        (GOOD.encode("utf-32"), "not UTF-8"),
        (b"\xff\xfe" + GOOD.encode(), "not UTF-8"),
        ("<?xml version='1.0' encoding='UTF-7'?>" + GOOD, "UTF-7"),
        ("<?xml version='1.0' encoding='iso-8859-1'?>" + GOOD, "iso-8859-1"),
        (b"x" * (SIZE_LIMIT + 1), "longer than"),
        ("<domain>" + "<a>" * 5000 + "</a>" * 5000 + "</domain>", "well-formed"),
        ("", "well-formed"),
        ("\0", "well-formed"),
        ("<domain", "well-formed"),
        ("<network><name>a</name></network>", "is not <domain>"),
        ("<domain type='kvm'><name>a</name></domain>", "no <memory>"),
        ("<domain><name>a</name><memory unit='ell'>1</memory></domain>", "unit"),
        ("<domain><name>a</name><memory>" + "9" * 5000 + "</memory></domain>", "number"),
        (domain("<vcpu>many</vcpu>"), "<vcpu>"),
        (domain("<vcpu cpuset='0-99999999999'>1</vcpu>"), "cpuset"),
        (domain("<cputune><vcpupin vcpu='0'/></cputune>"), "vcpupin"),
        (domain("<cpu mode='guest-passthrough'/>"), "mode of <cpu>"),
        (domain("<cpu><feature name='vmx' policy='maybe'/></cpu>"), "policy of vmx"),
        (domain("<cpu migratable='perhaps'/>"), "migratable"),
        (domain("<vcpu>٣</vcpu>"), "number"),
    ],
)  # fmt: skip
def test_hostile_xml_is_refused_in_one_sentence(raw, word):
    with pytest.raises(BadInput) as refused:
        DomainXml.parse(raw)
    assert word in refused.value.message
    assert "\n" not in refused.value.message
    assert len(refused.value.message) < 400


def test_fifty_megabytes_are_refused_at_once():
    raw = (GOOD[:-9] + "<!--" + "x" * (50 << 20) + "--></domain>").encode()
    start = time.process_time()
    with pytest.raises(BadInput, match="longer than"):
        DomainXml.parse(raw)
    assert time.process_time() - start < 1


def test_a_long_prolog_is_read_in_linear_time():
    text = "<!-- -->" * 100_000 + GOOD
    start = time.process_time()
    assert DomainXml.parse(text).guest.name == "a"
    assert time.process_time() - start < 5


def test_a_word_that_only_looks_like_a_document_type_is_no_harm():
    text = GOOD.replace("<name>", "<!-- <!DOCTYPE x> --><name>")
    assert DomainXml.parse(text).guest.name == "a"
    said = "<?xml version='1.0' encoding='utf-8'?><!-- <!DOCTYPE --> " + GOOD
    assert DomainXml.parse(said.encode("utf-8-sig")).guest.name == "a"


@given(st.binary(max_size=300))
@settings(max_examples=200, deadline=None)
def test_noise_is_bad_input_and_nothing_else(raw):
    for read in (DomainXml.parse, from_xml, lambda r: parse(r, "domain")):
        with pytest.raises(BadInput):
            read(raw)


@given(st.integers(0, len(GOOD) - 1), st.characters(codec="utf-8"))
@settings(max_examples=200, deadline=None)
def test_one_wrong_character_is_told_or_harmless(at, character):
    text = GOOD[:at] + character + GOOD[at + 1 :]
    try:
        document = DomainXml.parse(text)
        document.with_guest(document.guest)
    except BadInput:
        pass
