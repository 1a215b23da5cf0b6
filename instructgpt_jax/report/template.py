"""The page around the sections: one HTML file with its style sheet, no script, nothing fetched."""

import string

from instructgpt_jax.report import style

PAGE = string.Template("""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>$title</title>
<style>
$css
</style>
</head>
<body>
<header>
<p class="kicker">$title</p>
<h1>$headline</h1>
<p class="facts">$facts</p>
</header>
<nav aria-label="Sections">$contents</nav>
<main>
$sections
</main>
<footer>$footer</footer>
</body>
</html>
""")

CSS = string.Template("""
:root { color-scheme: light dark; $light --soft: #f5f7f9; --good: #00734f; --bad: #b3261e; --open: #7a5a00; }
@media (prefers-color-scheme: dark) {
  :root { $dark --soft: #1f252d; --good: #4bd1a0; --bad: #ff8f85; --open: #e9c25a; }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; scroll-behavior: smooth; }
body { margin: 0 auto; max-width: 74rem; padding: 2.5rem 1.25rem 4rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "DejaVu Sans", sans-serif;
  overflow-wrap: break-word; }
h1, h2, h3, p { margin: 0; text-wrap: pretty; }
.kicker { color: var(--muted); font-size: .95rem; }
h1 { font-size: clamp(1.65rem, 1.1rem + 2.4vw, 2.7rem); line-height: 1.15; letter-spacing: -.015em;
  margin: .35rem 0 .8rem; max-width: 24em; text-wrap: balance; }
.facts { color: var(--muted); max-width: 46rem; }
nav { margin: 1.6rem 0 0; padding: .7rem 0; border-block: 1px solid var(--grid); display: flex; flex-wrap: wrap;
  gap: .25rem 1.1rem; font-size: .93rem; }
a { color: var(--sft); text-underline-offset: .15em; }
nav a { text-decoration: none; }
a:hover { text-decoration: underline; }
section { margin-top: 3.2rem; scroll-margin-top: 1rem; }
h2 { font-size: 1.4rem; letter-spacing: -.01em; line-height: 1.25; }
h3 { font-size: 1rem; line-height: 1.35; margin-bottom: .35rem; }
h2 + p, figcaption { color: var(--muted); max-width: 46rem; margin-top: .5rem; }
.of { margin: 1.6rem 0 -.3rem; }
.small { max-width: 34rem; }
figure { margin: 2.2rem 0 0; } h2 + figure { margin-top: .5rem; }
figure h3 { font-size: 1.12rem; margin: 0; }
.panels { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(19rem, 100%), 1fr)); gap: 1.5rem 1.8rem;
  margin-top: .9rem; }
.panels.one { grid-template-columns: minmax(0, 32rem); }
.panels.two { grid-template-columns: repeat(auto-fit, minmax(min(22rem, 100%), 29rem)); }
.panel { min-width: 0; }
.panel h4 { margin: 0 0 .2rem; font-size: .95rem; font-weight: 600; }
.panel svg { display: block; width: 100%; height: auto; }
.panel svg * { stroke-linejoin: round; stroke-linecap: butt; }
.panel svg text { font-family: inherit !important; }
.legend { display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; list-style: none; margin: .8rem 0 0; padding: 0;
  font-size: .93rem; }
.sign { width: 32px; height: 14px; margin-right: .45em; vertical-align: -.1em; font-size: 14px; }
.png { font-size: .85rem; margin-top: .5rem; }
.scroll { overflow-x: auto; margin-top: 1rem; border: 1px solid var(--grid); border-radius: .5rem; }
table { border-collapse: separate; border-spacing: 0; width: 100%; font-size: .9rem;
  font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .5rem .8rem; border-bottom: 1px solid var(--grid); vertical-align: top; }
tr:last-child > * { border-bottom: 0; }
thead th { font-weight: 600; background: var(--soft); vertical-align: bottom; }
.numbers td { text-align: right; white-space: nowrap; }
.numbers thead th + th { text-align: right; min-width: 6.5rem; }
.numbers th { font-weight: 500; }
.numbers tbody th { position: sticky; left: 0; background: var(--paper); min-width: 8.5rem; max-width: 14rem; }
.numbers small { display: block; color: var(--muted); font-size: .78rem; }
.numbers tr.head th { background: var(--soft); color: var(--muted); font-size: .82rem; }
.findings td:first-child { font-weight: 500; }
.findings td:last-child { font-weight: 600; white-space: nowrap; }
.holds { color: var(--good); } .fails { color: var(--bad); } .unclear { color: var(--open); }
.sample { margin-top: 1.8rem; }
.sample h3 { color: var(--muted); font-weight: 500; font-size: .9rem; }
.text { white-space: pre-wrap; overflow-wrap: anywhere; }
.prompt { background: var(--soft); border-radius: .5rem; padding: .8rem 1rem; }
.responses { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(16rem, 100%), 1fr)); gap: .9rem;
  margin-top: .9rem; }
.response { border: 1px solid var(--grid); border-top: .25rem solid var(--tint); border-radius: .5rem;
  padding: .6rem .9rem .8rem; min-width: 0; }
.response .text { font-size: .95rem; max-height: 24rem; overflow-y: auto; }
.scores { display: block; color: var(--muted); font-size: .82rem; font-weight: 400; }
.chosen { border-left: .25rem solid var(--good); }
.prefix { margin-top: .9rem; }
.empty { color: var(--muted); font-style: italic; }
details { margin-top: 1.4rem; } summary { cursor: pointer; color: var(--sft); }
.columns { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(18rem, 100%), 1fr)); gap: 0 1.8rem;
  align-items: start; }
footer { margin-top: 4rem; padding-top: 1rem; border-top: 1px solid var(--grid); color: var(--muted);
  font-size: .9rem; }
@media (max-width: 44rem) {
  body { padding: 1.5rem 1rem 3rem; } section { margin-top: 2.6rem; } th, td { padding: .45rem .6rem; }
  .findings thead { display: none; }
  .findings tr { display: grid; grid-template-columns: 1fr 1fr; padding: .6rem .8rem;
    border-bottom: 1px solid var(--grid); }
  .findings tr:last-child { border-bottom: 0; }
  .findings td { border: 0; padding: 0 .6rem .2rem 0; }
  .findings td:first-child, .findings td:last-child { grid-column: 1 / -1; }
  .findings td:nth-child(2)::before { content: "Paper"; } .findings td:nth-child(3)::before { content: "This run"; }
  .findings td::before { display: block; color: var(--muted); font-size: .8rem; }
}
@media print { nav { display: none; } section, figure, .sample { break-inside: avoid; } }
""")


def page(**parts: str) -> str:
    """The whole page; the parts are HTML already."""
    css = CSS.substitute(light=style.variables(dark=False), dark=style.variables(dark=True)).strip()
    return PAGE.substitute(css=css, **parts)
