"""Style sheets of pages, for light and dark mode and for small screens."""

from lightning_rlhf.report.charts import COLORS

#: Rules of every page: colors and text.
BASE = """
:root { color-scheme: light dark; --ink: #1c2024; --soft: #667; --back: #fff; --card: #f4f5f7; --edge: #dde;
  --line: #1f6feb; --mark: #b35900 }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e8ea; --soft: #9aa; --back: #14171a; --card: #1e2226;
  --edge: #343a40; --line: #6cb0ff; --mark: #ffb454 } }
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 72rem; padding: 1rem; color: var(--ink); background: var(--back);
  font: 1rem/1.5 system-ui, sans-serif }
h1 { font-size: 1.6rem; margin: .5rem 0; overflow-wrap: anywhere }
h2 { font-size: 1.3rem; border-top: 1px solid var(--edge); padding-top: 1rem; overflow-wrap: anywhere }
.note { color: var(--soft); font-size: .85rem; margin: .25rem 0; overflow-wrap: anywhere }
dt { color: var(--soft); font-size: .85rem } dd { margin: 0; font-variant-numeric: tabular-nums }
article { background: var(--card); border-radius: .5rem; padding: .5rem .75rem; margin: .5rem 0 }
table { border-collapse: collapse; font-size: .85rem }
@media (max-width: 40rem) { body { padding: .75rem } h1 { font-size: 1.2rem } }
"""
#: Rules of reports, with the colors of lines.
STYLE = """
/* light */
@media (prefers-color-scheme: dark) { /* dark */ }
h3 { font-size: 1.05rem; margin: 1.5rem 0 .5rem } h4 { margin: 1rem 0 .25rem }
a { color: var(--line) } nav a { margin-right: 1rem; overflow-wrap: anywhere }
.when { color: var(--soft); font-size: .85rem; margin: .25rem 0; overflow-wrap: anywhere }
.cards { display: flex; flex-wrap: wrap; gap: .5rem; margin: .75rem 0 0 }
.cards div { background: var(--card); border-radius: .5rem; padding: .5rem .75rem }
article p { margin: .25rem 0 } .prompt { font-weight: 600 }
.prompt, .text { white-space: pre-wrap; overflow-wrap: anywhere }
.answers { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: .25rem 1.5rem }
.many { grid-template-columns: none; grid-auto-flow: column; grid-auto-columns: minmax(15rem, 1fr); overflow-x: auto }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 20rem), 1fr)); gap: .75rem }
figure { margin: 0; background: var(--card); border-radius: .5rem; padding: .5rem; min-width: 0 }
figcaption { font-size: .85rem; overflow-wrap: anywhere } svg { display: block; width: 100%; height: auto }
.legend { display: flex; flex-wrap: wrap; gap: 0 .75rem; margin: 0 0 .25rem; padding: 0; list-style: none }
i { display: inline-block; width: 1.1rem; border-top: 3px solid var(--line); margin-right: .35rem;
  vertical-align: middle }
i.dashed { border-top-style: dashed } i.dotted { border-top-style: dotted }
polyline { fill: none; stroke: var(--line); stroke-width: 2; stroke-linejoin: round; stroke-linecap: round }
polyline.raw { stroke-width: 1; opacity: .35 } .grid { stroke: var(--edge) }
.dots { stroke: var(--line); stroke-width: 4; stroke-linecap: round; opacity: .45 }
article details { margin: .5rem 0 0; font-size: .85rem } .one { max-width: 34rem }
.band { fill: var(--line); opacity: .18 }
.dashed polyline { stroke-dasharray: 6 4 } .dotted polyline { stroke-dasharray: 1 4 }
svg text { font-size: 10px; fill: var(--soft) } text.y { text-anchor: end; dominant-baseline: middle }
text.x { text-anchor: middle }
details { margin: .75rem 0 } summary { cursor: pointer }
.wide { overflow-x: auto }
th, td { text-align: left; padding: .15rem .75rem .15rem 0; border-bottom: 1px solid var(--edge); vertical-align: top }
td { font-variant-numeric: tabular-nums; max-width: 24rem; overflow-wrap: break-word } th { font-weight: 500 }
.runs th, .runs td { white-space: nowrap }
.runs tbody th { white-space: normal; overflow-wrap: anywhere; min-width: 10rem }
.runs td:nth-last-child(3) { white-space: normal; min-width: 9rem } td details { margin: 0 }
.changed { color: var(--mark) }
@media (max-width: 40rem) { .answers { grid-template-columns: 1fr } .many { grid-template-columns: none } }
"""
for _place, _scheme in (("/* light */", 0), ("/* dark */", 1)):
    _rules = " ".join(f".c{i} {{ --line: {colors[_scheme]} }}" for i, colors in enumerate(COLORS))
    STYLE = STYLE.replace(_place, _rules)
STYLE = BASE + STYLE
