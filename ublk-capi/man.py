"""Man pages of section 3 from the comments of ublk_rs.h: `man.py HEADER DIRECTORY VERSION`. One for each function."""

from __future__ import annotations

import re
import sys
from pathlib import Path

_FUNCTION = re.compile(r"/\*\*\n(?P<doc>(?: \*.*\n)+?) \*/\n(?P<proto>[a-z][^;{}#]*?\b(?P<name>ublk_rs_\w+)\([^;]*\));")
_NAMED = re.compile(r"\b(ublk_rs_\w+)\(\)")
_PARAMETER = re.compile(r"@param (\w+)\s+(.*)", re.DOTALL)


def _escape(text: str) -> str:
    text = text.replace("\\", "\\e").replace("-", "\\-")
    return "\n".join("\\&" + line if line.startswith((".", "'")) else line for line in text.splitlines())


def _prose(text: str) -> str:
    return _NAMED.sub(r"\\fB\1\\fP(3)", _escape(" ".join(text.split())))


def _parts(doc: str) -> tuple[list[str], list[tuple[str, str]], str]:
    """Paragraphs, parameters, and what is returned."""
    lines = [line[2:].lstrip() if line.strip() == "*" else line[3:] for line in doc.splitlines()]
    paragraphs, parameters, returned = [], [], ""
    for block in re.split(r"\n\s*\n|\n(?=@)", "\n".join(lines)):
        text = block.strip()
        if found := _PARAMETER.match(text):
            parameters.append((found[1], " ".join(found[2].split())))
        elif text.startswith("@return"):
            returned = " ".join(text.removeprefix("@return").split())
        elif text:
            paragraphs.append(" ".join(text.split()))
    return paragraphs, parameters, returned


def page(name: str, prototype: str, doc: str, version: str) -> str:
    """One page, in man(7)."""
    paragraphs, parameters, returned = _parts(doc)
    first = re.split(r"(?<=[.:;])\s", paragraphs[0])[0].rstrip(".:;")
    declared = re.sub(r"\s+", " ", prototype)
    lines = [
        f'.TH {name} 3 "" "ublk-rs {version}" "libublk_rs"',
        ".SH NAME",
        f"{name} \\- {_escape(first[0].lower() + first[1:])}",
        ".SH SYNOPSIS",
        ".nf",
        "#include <ublk_rs.h>",
        ".PP",
        _escape(declared) + ";",
        ".fi",
        ".PP",
        "Link with \\fI\\-lublk_rs\\fP; \\fBpkg\\-config \\-\\-cflags \\-\\-libs ublk\\-rs\\fP.",
        ".SH DESCRIPTION",
    ]
    for paragraph in paragraphs:
        lines += [".PP", _prose(paragraph)]
    for parameter, text in parameters:
        lines += [".TP", f"\\fI{parameter}\\fP", _prose(text)]
    if returned:
        lines += [".SH RETURN VALUE", _prose(returned)]
    seen = sorted({other for other in _NAMED.findall(doc) if other != name})
    if seen:
        lines += [".SH SEE ALSO", ",\n".join(f"\\fB{_escape(other)}\\fP(3)" for other in seen)]
    return "\n".join(lines) + "\n"


def main(argv: list[str]) -> int:
    """Write all pages."""
    header, into, version = Path(argv[0]), Path(argv[1]), argv[2]
    found = list(_FUNCTION.finditer(header.read_text()))
    for match in found:
        text = page(match["name"], match["proto"], match["doc"], version)
        (into / f"{match['name']}.3").write_text(text)
    return 0 if found else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
