"""The style and the script of the HTML report; the page is complete without the script."""

STYLE = """
:root { color-scheme: light dark; --page: #f6f7f9; --card: #fff; --ink: #1b2330; --soft: #5b6676;
  --line: #d9dee6; --accent: #2563c9; --warn: #fff4d6; --warn-line: #c98a00; --box: #eef2f8; }
.hue0 { --hue: #2563c9; } .hue1 { --hue: #c2410c; } .hue2 { --hue: #15803d; }
.hue3 { --hue: #7e22ce; } .hue4 { --hue: #b91c5c; } .hue5 { --hue: #0e7490; }
.hue6 { --hue: #8a6d00; } .hue7 { --hue: #475569; }
@media (prefers-color-scheme: dark) {
  :root { --page: #12161c; --card: #1b212a; --ink: #e5e9f0; --soft: #9aa6b6; --line: #323b48;
    --accent: #6ea8ff; --warn: #33290f; --warn-line: #d9a520; --box: #27303c; }
  .hue0 { --hue: #6ea8ff; } .hue1 { --hue: #fb923c; } .hue2 { --hue: #4ade80; }
  .hue3 { --hue: #c084fc; } .hue4 { --hue: #f472b6; } .hue5 { --hue: #22d3ee; }
  .hue6 { --hue: #eab308; } .hue7 { --hue: #a3b1c6; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
header, main { max-width: 1240px; margin: 0 auto; padding: 0 24px; }
header { padding-top: 28px; }
h1 { font-size: 28px; margin: 0; letter-spacing: -.02em; }
h2 { font-size: 19px; margin: 0 0 12px; } h3 { font-size: 15px; margin: 4px 0; }
header p { margin: 4px 0 12px; color: var(--soft); }
.phase { font-size: 14px; letter-spacing: 0; font-weight: 600; vertical-align: 5px;
  margin-left: 8px; padding: 2px 10px; border: 1px solid var(--accent); border-radius: 99px;
  color: var(--accent); }
nav { display: flex; flex-wrap: wrap; gap: 4px 18px; }
a { color: var(--accent); text-decoration: none; } a:hover { text-decoration: underline; }
section { background: var(--card); border: 1px solid var(--line); border-radius: 10px;
  padding: 18px 20px; margin: 18px 0; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(190px, 1fr)); gap: 12px; }
.card { background: var(--box); border-radius: 8px; padding: 12px 14px; }
.card b { display: block; font-size: 25px; line-height: 1.25; font-variant-numeric: tabular-nums; }
.card span { display: block; font-weight: 600; }
.card small, .key, figcaption small { color: var(--soft); }
.key { margin: 0 0 10px; font-size: 14px; }
.warnings { margin-top: 14px; padding: 8px 16px; background: var(--warn);
  border-left: 4px solid var(--warn-line); border-radius: 4px; }
.warnings ul { margin: 4px 0; padding-left: 18px; }
.scroll { overflow: auto; } .tall { max-height: 560px; }
table { border-collapse: collapse; width: 100%; font-size: 13.5px; }
th, td { text-align: left; padding: 4px 12px 4px 0; border-bottom: 1px solid var(--line);
  vertical-align: middle; }
th { position: sticky; top: 0; background: var(--card); color: var(--soft); font-weight: 600;
  white-space: nowrap; z-index: 1; }
th[aria-sort]::after { content: " \\25B4"; }
th[aria-sort="descending"]::after { content: " \\25BE"; }
.sortable { cursor: pointer; }
td { white-space: nowrap; }
.number { text-align: right; font-variant-numeric: tabular-nums; }
.name, figcaption { font-family: ui-monospace, "SF Mono", Menlo, "DejaVu Sans Mono", monospace;
  font-size: 12.5px; }
.name { white-space: normal; overflow-wrap: anywhere; min-width: 220px; }
.why { white-space: normal; min-width: 200px; overflow-wrap: anywhere; }
input { font: inherit; width: 280px; max-width: 100%; margin-bottom: 8px; padding: 4px 10px;
  color: inherit; background: var(--page); border: 1px solid var(--line); border-radius: 6px; }
.bars { width: 152px; height: 15px; display: inline-block; vertical-align: middle; }
.before { fill: none; stroke: var(--soft); } .after { fill: var(--accent); }
.beside { display: flex; flex-wrap: wrap; gap: 12px 36px; align-items: flex-start; }
.beside .scroll { flex: 1 1 420px; } .figure { overflow: auto; max-width: 100%; }
.rail-letter { display: inline-block; width: 22px; text-align: center; border-radius: 99px;
  border: 1.5px solid var(--hue); }
.block text { font: 12px ui-monospace, "SF Mono", Menlo, "DejaVu Sans Mono", monospace;
  fill: var(--ink); }
.module rect { fill: var(--box); stroke: var(--line); } .other rect { fill: var(--card); }
.linear text { font-weight: 600; }
.rail, .wire { fill: none; stroke: var(--hue); stroke-width: 2; }
.wire { stroke-width: 1; opacity: .75; }
.accepted .rail { stroke-width: 5; }
.pinned .rail, .pinned .wire { stroke-dasharray: 4 4; }
.head, .block circle { fill: var(--hue); }
.block .badge { fill: var(--card); stroke: var(--hue); stroke-width: 1.5; }
.block .letter { font-size: 11px; font-weight: 700; text-anchor: middle; }
.orders { display: grid; grid-template-columns: repeat(auto-fill, minmax(270px, 1fr)); gap: 18px; }
figure { margin: 0; } .many { display: grid; grid-template-columns: 1fr 1fr; gap: 6px; }
figure div { max-width: 220px; }
figcaption { overflow-wrap: anywhere; margin-top: 4px; }
.order { display: block; width: 100%; } .many .order { --dot: 9; }
.frame { fill: var(--page); stroke: var(--line); stroke-width: 2; }
.diagonal { stroke: var(--line); stroke-width: 2; }
.dots { stroke: var(--accent); stroke-width: var(--dot, 5); stroke-linecap: round; fill: none; }
@media print { .tall { max-height: none; } body { background: #fff; } }
"""

SCRIPT = """
for (const table of document.querySelectorAll("table")) {
  const body = table.tBodies[0], rows = [...body.rows];
  const key = (row, i) => {
    const cell = row.cells[i], value = cell.dataset.value;
    return value !== undefined ? Number(value)
      : cell.classList.contains("number") ? -Infinity : cell.textContent;
  };
  if (rows.length > 3) [...table.tHead.rows[0].cells].forEach((head, i) => {
    if (!rows.some(row => row.cells[i].textContent)) return;
    head.classList.add("sortable");
    head.addEventListener("click", () => {
      const up = head.getAttribute("aria-sort") !== "ascending";
      for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", up ? "ascending" : "descending");
      rows.sort((a, b) => {
        const x = key(a, i), y = key(b, i);
        return (x < y ? -1 : x > y ? 1 : 0) * (up ? 1 : -1);
      });
      body.append(...rows);
    });
  });
  if (rows.length > 12 && !table.closest(".beside")) {
    const input = document.createElement("input");
    input.type = "search";
    input.placeholder = "show rows that contain";
    input.setAttribute("aria-label", input.placeholder);
    input.addEventListener("input", () => {
      for (const row of rows)
        row.hidden = !row.textContent.toLowerCase().includes(input.value.toLowerCase());
    });
    table.parentElement.before(input);
  }
}
"""
