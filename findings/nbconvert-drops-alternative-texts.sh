#!/usr/bin/env bash
# nbconvert's default HTML and a figure's alternative text: it is written into no image,
# wherever it stands, and the warning says that there is none.
#
# Guess before it was run: `alt` in the metadata of an output, or of its cell, becomes the
# image's alt, as it does with the classic template.
# Seen: `--template classic` reads both places. The default template (lab) reads neither,
# fills in "No description has been provided for this image", and warns that the
# alternative text is missing.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet nbconvert==7.16.6 nbformat==5.10.4
cat > check.py <<'P'
import logging
import sys

import nbconvert
import nbformat
from nbformat.v4 import new_code_cell, new_notebook, new_output

DOT = (
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAQAAAC1HAwCAAAAC0lEQVR42mNk+A8AAQUBAScY42YAAAAA"
    "SUVORK5CYII="
)
TEXT = "A row of three dots."
heard = []


class Keep(logging.Handler):
    def emit(self, record):
        heard.append(record.getMessage())


def page(template, at_output):
    found = {"image/png": {"alt": TEXT}} if at_output else {}
    shown = new_output("display_data", {"image/png": DOT}, metadata=found)
    cell = new_code_cell("", metadata={} if at_output else {"alt": TEXT}, outputs=[shown])
    notebook = new_notebook(cells=[cell])
    nbformat.validate(notebook)
    exporter = nbconvert.HTMLExporter(template_name=template)
    exporter.log.addHandler(Keep())
    return exporter.from_notebook_node(notebook)[0]


print("nbconvert", nbconvert.__version__)
there = {
    (template, place): f'alt="{TEXT}"' in page(template, place == "output")
    for template in ("lab", "classic")
    for place in ("output", "cell")
}
for (template, place), found in there.items():
    print(f"template {template}, alt in the metadata of the {place}: shown {found}")
missing = [text for text in heard if "Alternative text is missing" in text]
print("warned:", set(missing))
lab = [found for (template, _), found in there.items() if template == "lab"]
classic = [found for (template, _), found in there.items() if template == "classic"]
sys.exit(any(lab) or not all(classic) or not missing)
P
code=0
venv/bin/python -W ignore check.py || code=$?
[ "$code" = 0 ] && echo "as described" || echo "CHANGED"
exit "$code"
