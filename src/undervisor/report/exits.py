"""A tally of exits as a table."""

from __future__ import annotations

from rich.table import Table

from undervisor.host.exits.attribute import Tally, Whose

_SHOWN = (Whose.L1, Whose.L2_TO_L0, Whose.L2_TO_L1, Whose.MADE_UP, Whose.UNKNOWN)


def table(tally: Tally, most: int = 25) -> Table:
    """Reasons by owner, the most frequent first; columns that are all zero are left out."""
    shown = [whose for whose in _SHOWN if tally.total(whose) or whose is Whose.L1]
    seconds = tally.seconds
    found = Table(title=title(tally), title_justify="left", caption_justify="left")
    found.add_column("reason")
    for whose in shown:
        found.add_column(whose.value, justify="right")
    found.add_column("per second", justify="right")
    rows = tally.rows()
    for reason, counts in rows[:most]:
        rate = f"{sum(counts.values()) / seconds:,.1f}" if seconds else "-"
        found.add_row(reason, *(f"{counts[whose]:,}" for whose in shown), rate)
    totals = [tally.total(whose) for whose in shown]
    rate = f"{sum(tally.total(w) for w in Whose) / seconds:,.1f}" if seconds else "-"
    found.add_section()
    found.add_row("all", *(f"{total:,}" for total in totals), rate)
    if len(rows) > most:
        found.caption = f"and {len(rows) - most} more reasons"
    return found


def title(tally: Tally) -> str:
    """One line about the whole."""
    words = f"{tally.seconds:.3f} s, {tally.vcpus} vCPUs, {tally.nested_entries:,} nested entries"
    return words + (f", events lost {tally.lost} times" if tally.lost else "")


def remarks(tally: Tally) -> list[str]:
    """What a reader of the table has to know."""
    found = []
    if not tally.nested_events and tally.total(Whose.UNKNOWN):
        found.append(
            "no kvm_nested_* event is in this trace: either no L2 ran, or they were not recorded; "
            "L1 and L2 can't be told apart"
        )
    if tally.lost:
        found.append("events were lost; exits next to the gaps are counted as unknown")
    reflected = tally.total(Whose.L2_TO_L1)
    if reflected:
        ratio = tally.total(Whose.L1) / reflected
        found.append(f"L1 itself exited {ratio:.1f} times per exit of L2 that it handled")
    return found
