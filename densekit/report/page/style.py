"""Style and script of the page. Colours are of Okabe and Ito's palette, which the colour-blind can tell apart."""

CSS = """
:root { color-scheme: light dark;
  --bg: #ffffff; --fg: #1b1f24; --soft: #57606a; --line: #d5dae0; --panel: #f5f7f9; --head: #eceff3;
  --c1: #0067a5; --c2: #c24e00; --c3: #007a58; --c4: #a8467f; --c5: #2487b8; --c6: #7a6a00;
  --heat: #0067a5; --add: #dcf3e4; --remove: #fbe3dc; }
@media (prefers-color-scheme: dark) { :root {
  --bg: #14171b; --fg: #e6e9ed; --soft: #a2acb8; --line: #363d46; --panel: #1c2127; --head: #262c34;
  --c1: #56b4e9; --c2: #f0904a; --c3: #35c79a; --c4: #e094c0; --c5: #8ccdf2; --c6: #e8d44d;
  --heat: #56b4e9; --add: #17392a; --remove: #4a251b; } }
* { box-sizing: border-box; }
html { scroll-padding-top: 3.2rem; }
body { margin: 0 auto; max-width: 76rem; padding: 0 1rem 4rem; background: var(--bg); color: var(--fg);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 1.5rem 0 .3rem; }
h2 { font-size: 1.25rem; margin: 2.6rem 0 .8rem; padding-top: .8rem; border-top: 1px solid var(--line); }
h3 { font-size: 1.05rem; margin: 1.4rem 0 .4rem; }
h4 { font-size: .95rem; margin: 1rem 0 .3rem; }
nav { position: sticky; top: 0; z-index: 2; background: var(--bg); border-bottom: 1px solid var(--line);
  margin: .8rem -1rem 0; padding: .45rem 1rem; display: flex; gap: .2rem 1rem; overflow-x: auto; white-space: nowrap; }
a { color: var(--c1); }
.note { color: var(--soft); font-size: .9rem; margin: .4rem 0; }
.columns { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 27rem), 1fr)); gap: .5rem 1.6rem; }
.columns > div { min-width: 0; }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(9.5rem, 1fr)); gap: .7rem; }
figure { margin: .6rem 0; }
figcaption { font-size: .92rem; font-weight: 600; }
.chart svg:not(.key) { width: 100%; height: auto; display: block; background: var(--panel); border-radius: 6px;
  margin-top: .25rem; }
.chart { max-width: 38rem; }
.small figcaption { font-size: .85rem; }
.tick { font-size: 11.5px; fill: var(--soft); }
.middle { text-anchor: middle; } .end { text-anchor: end; }
.grid line, line.grid { stroke: var(--line); stroke-width: 1; }
.line { fill: none; stroke: var(--k); stroke-width: 2; stroke-linejoin: round; }
.small .line { stroke-width: 1.8; }
.faint { opacity: .3; stroke-width: 1; }
.dot { fill: var(--k); }
.c1 { --k: var(--c1); } .c2 { --k: var(--c2); } .c3 { --k: var(--c3); }
.c4 { --k: var(--c4); } .c5 { --k: var(--c5); } .c6 { --k: var(--c6); }
.ramp { --k: color-mix(in oklab, var(--c2) var(--p), var(--c1)); }
.legend { list-style: none; display: flex; flex-wrap: wrap; gap: .1rem .9rem; margin: .35rem 0 0; padding: 0;
  font-size: .85rem; }
.key { width: 24px; height: 10px; vertical-align: middle; }
.swatch { display: inline-block; width: .8em; height: .8em; background: var(--k); border-radius: 2px; }
.wide { overflow: auto; max-height: 38rem; margin: 0 0 1.2rem; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; min-width: 50%;
  overflow-wrap: normal; }
.caption { font-weight: 600; font-size: .92rem; margin: 1rem 0 .35rem; }
th, td { padding: .22rem .6rem; border-bottom: 1px solid var(--line); text-align: left; vertical-align: baseline; }
thead th { position: sticky; top: 0; z-index: 1; background: var(--head); border-bottom: 2px solid var(--line); }
tbody th { font-weight: 500; position: sticky; left: 0; background: var(--bg); min-width: 6rem; }
@media (min-width: 48rem) { tbody th { white-space: nowrap; } }
.n { text-align: right; white-space: nowrap; }
th button { all: unset; cursor: pointer; font-weight: 600; }
th button:focus-visible, .wide:focus-visible, summary:focus-visible, a:focus-visible { outline: 2px solid var(--c1); }
th[aria-sort=ascending] button::after { content: " ▲"; } th[aria-sort=descending] button::after { content: " ▼"; }
.bars { min-width: 7rem; width: 30%; vertical-align: middle; }
.bar { display: block; height: .55rem; background: var(--k); border-radius: 2px; margin: 1px 0; }
.confusion table { font-size: .82rem; }
.confusion th, .confusion td { padding: .25rem .35rem; }
.matrix { max-width: 34rem; } .matrix img { border: 1px solid var(--line); }
.heat { background: color-mix(in oklab, var(--heat) var(--s), var(--bg)); }
.columns .columns { grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: .4rem; }
.pair.big { grid-template-columns: 1fr; }
.zoom { all: unset; display: block; cursor: zoom-in; width: 100%; } .big .zoom { cursor: zoom-out; }
.zoom:focus-visible { outline: 2px solid var(--c1); }
.pair span { font-size: .82rem; color: var(--soft); display: block; }
img { max-width: 100%; width: 100%; height: auto; display: block; border-radius: 4px; }
.shown figcaption { font-weight: 400; font-size: .9rem; }
.shown { border-bottom: 1px solid var(--line); padding-bottom: .6rem; }
pre { background: var(--panel); padding: .7rem; border-radius: 6px; overflow-x: auto; font-size: .8rem;
  white-space: pre-wrap; margin: .3rem 0; max-height: 24rem; }
.added { background: var(--add); } .removed { background: var(--remove); }
summary { cursor: pointer; margin: .5rem 0; color: var(--c1); }
nav span { flex: none; }
#hint { position: absolute; z-index: 3; pointer-events: none; background: var(--head); color: var(--fg);
  border: 1px solid var(--line); border-radius: 4px; padding: .25rem .5rem; font-size: .8rem; white-space: pre; }
@media print { nav { display: none; } .wide, pre { max-height: none; }
  section { break-inside: auto; } figure { break-inside: avoid; } }
"""

# Values under the pointer are read back from the lines as drawn; a click on a heading sorts its table.
SCRIPT = """
'use strict';
const hint = document.getElementById('hint');
function show(event) {
  const svg = event.currentTarget;
  const [, left, right, x0, x1, bottom, top, y0, y1] = JSON.parse(svg.dataset.frame);
  const matrix = svg.getScreenCTM();
  if (!matrix) return;
  const x = new DOMPoint(event.clientX, event.clientY).matrixTransform(matrix.inverse()).x;
  const rows = [];
  let at = null;
  for (const line of svg.querySelectorAll('polyline[data-name]')) {
    let best = null;
    for (const p of line.points) if (!best || Math.abs(p.x - x) < Math.abs(best.x - x)) best = p;
    if (!best || Math.abs(best.x - x) > 20) continue;
    if (at === null || Math.abs(best.x - x) < Math.abs(at - x)) at = best.x;
    const value = y0 + (bottom - best.y) / (bottom - top) * (y1 - y0);
    rows.push(line.dataset.name + '  ' + Number(value.toPrecision(3)));
  }
  hint.hidden = at === null;
  if (at === null) return;
  const [label] = JSON.parse(svg.dataset.labels);
  const place = x0 + (at - left) / (right - left) * (x1 - x0);
  hint.textContent = label + '  ' + Number(place.toPrecision(4)) + '\\n' + rows.join('\\n');
  const room = document.documentElement.clientWidth - hint.offsetWidth - 8;
  hint.style.left = Math.max(4, Math.min(event.pageX + 14, room)) + 'px';
  hint.style.top = (event.pageY + 14) + 'px';
}
for (const svg of document.querySelectorAll('svg[data-frame]')) {
  svg.addEventListener('pointermove', show);
  svg.addEventListener('pointerleave', () => { hint.hidden = true; });
}
for (const button of document.querySelectorAll('.zoom')) {
  button.addEventListener('click', () => button.closest('.pair').classList.toggle('big'));
}
function value(row, column) {
  const cell = row.cells[column];
  return cell.dataset.value === undefined ? cell.textContent : Number(cell.dataset.value);
}
for (const button of document.querySelectorAll('th button')) {
  button.addEventListener('click', () => {
    const head = button.parentElement, body = head.closest('table').tBodies[0];
    const down = head.getAttribute('aria-sort') !== 'descending';
    for (const other of head.parentElement.cells) other.removeAttribute('aria-sort');
    head.setAttribute('aria-sort', down ? 'descending' : 'ascending');
    const rows = [...body.rows], column = head.cellIndex;
    const unknown = row => row.cells[column].textContent === '\\u2013';
    rows.sort((a, b) => {
      if (unknown(a) || unknown(b)) return unknown(a) - unknown(b);
      const p = value(a, column), q = value(b, column);
      const order = typeof p === 'number' && typeof q === 'number' ? p - q : String(p).localeCompare(String(q));
      return down ? -order : order;
    });
    body.append(...rows);
  });
}
"""
