"""The tables of ``docs/reference/instructions.md``, made of the fields' own words."""

import dataclasses


def table(cls):
    """One row a field: name, unit, default, meaning."""
    if not dataclasses.fields(cls):
        return "No fields.\n"
    lines = ["| field | unit | default | meaning |", "|---|---|---|---|"]
    for field in dataclasses.fields(cls):
        law, default = field.metadata, field.default
        shown = (
            "needed" if default is dataclasses.MISSING else f"`{ {None: 'null', True: 'true'}.get(default, default) }`"
        )
        choices = f" ({', '.join(law['choices'])})" if law.get("choices") else ""
        above = " (above 0)" if law.get("above") == 0 else ""
        lines.append(f"| `{field.name}` | {law['unit']} | {shown} | {law['what']}{choices}{above} |")
    return "\n".join(lines) + "\n"
