"""Prints the table of docs/models.md: which of mlx-lm's model families run, and why others do not.

python docs/models_table.py
"""

from mlx_paged.models.registry import FAMILIES, SAME_CODE, Family

HEADINGS = {
    "verified": "verified: compared over block sizes, chunks, batches, orders and preemption",
    "tested": "tested: compared over one batch of prompts",
}


def table() -> str:
    """Write all families as Markdown: those that run by how well that is tested, the others by what is in the way."""
    lines = ["| families | |", "|---|---|"]
    for status, heading in HEADINGS.items():
        shown = [_with_note(family) for family in FAMILIES.values() if family.status == status]
        lines.append(f"| {', '.join(sorted(shown, key=str.lower))} | {heading} |")
    refused = [family for family in FAMILIES.values() if family.status == "refused"]
    for why in dict.fromkeys(family.note for family in refused):
        names = sorted(family.name for family in refused if family.note == why)
        lines.append(f"| {', '.join(f'`{name}`' for name in names)} | refused: {why} |")
    same = ", ".join(f"`{name}` as `{code}`" for name, code in SAME_CODE.items())
    return "\n".join(lines) + f"\n\nFamilies that mlx-lm runs with another's code count as that one: {same}.\n"


def _with_note(family: Family) -> str:
    return f"`{family.name}` ({family.note})" if family.note else f"`{family.name}`"


if __name__ == "__main__":
    print(table(), end="")
