"""What the manuals say where a target and a rule disagree."""
SETTLED = {}
def settlement(rule: str, target: str) -> str:
    """x."""
    return ""
