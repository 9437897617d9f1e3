"""The page's style sheet and its one script, as text: nothing is fetched."""

CSS = """
:root { color-scheme: light; --ink: #1f2328; --soft: #57606a; --line: #d8dde3; --panel: #f6f8fa; }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; scroll-behavior: smooth; }
body { margin: 0; color: var(--ink); background: #fff; font: 16px/1.55 FONT; overflow-wrap: anywhere; }
main { max-width: 1000px; margin: 0 auto; padding: 28px 20px 60px; }
h1 { font-size: 1.75rem; line-height: 1.2; margin: 0 0 .5rem; letter-spacing: -.01em; }
h2 { font-size: 1.3rem; line-height: 1.25; margin: 3rem 0 .4rem; padding-top: 1.1rem;
  border-top: 1px solid var(--line); }
h3 { font-size: 1.05rem; margin: 1.6rem 0 .4rem; }
p { margin: .4rem 0 .7rem; max-width: 72ch; }
.lead { font-size: 1.06rem; }
.count, .caption, .left-out, .note { color: var(--soft); font-size: .9rem; }
a { color: #0b5cad; }
nav { font-size: .92rem; margin: 1rem 0 1.6rem; line-height: 1.9; }
nav a { margin-right: .9em; white-space: nowrap; }
.findings { list-style: none; margin: 1rem 0 0; padding: 0; }
.findings > li { display: grid; grid-template-columns: 7.4rem 1fr; gap: 0 1rem; padding: 1rem 0;
  border-top: 1px solid var(--line); }
.findings > li:last-child { border-bottom: 1px solid var(--line); }
.claim { font-size: 1.05rem; font-weight: 600; line-height: 1.4; margin: 0 0 .3rem; }
.topic { display: block; font-size: .84rem; font-weight: 400; color: var(--soft); text-decoration: none; }
.topic:hover { text-decoration: underline; }
.evidence { margin: .1rem 0 0; font-size: .88rem; }
.evidence ul { margin: .1rem 0 0; padding-left: 1.1em; line-height: 1.5; color: #3d444d; }
.evidence li { margin: .12rem 0; }
.chip { display: inline-block; align-self: start; justify-self: start; margin-top: .15rem; padding: .12rem .6rem;
  border-radius: 999px; border: 1px solid; font-size: .82rem; font-weight: 600; white-space: nowrap; }
.chip.found { background: #0f5f54; border-color: #0f5f54; color: #fff; }
.chip.not-found { background: #fff; border-color: #6b7380; color: #4a525c; }
.chip.mixed { background: #fbe7b8; border-color: #b98a12; color: #5b4300; }
.chip.description { background: #e9eef5; border-color: #a9b6c6; color: #33475f; }
.chip.no-answer { background: #fff; border-color: #a9b6c6; border-style: dashed; color: #33475f; }
.told { font-weight: 600; } .told .chip { margin: 0 .35rem 0 0; }
.short { font-size: 1.12rem; border-left: 4px solid #0f5f54; padding: .1rem 0 .1rem .8rem; }
.count { max-width: none; }
.figure { width: 100%; margin: .6rem 0 .2rem; }
.caption { max-width: none; margin: .15rem 0; }
.tools { display: flex; flex-wrap: wrap; gap: .5rem .8rem; align-items: center; margin: .7rem 0 .4rem;
  font-size: .9rem; }
.button { display: inline-block; padding: .3rem .8rem; border: 1px solid #8a94a0; border-radius: 6px; color: var(--ink);
  background: #fff; text-decoration: none; }
.button:hover, .button:focus { background: var(--panel); }
details { margin: .5rem 0; font-size: .92rem; }
summary { cursor: pointer; padding: .2rem 0; color: #0b5cad; }
.scroll { overflow: auto; max-height: 26rem; border: 1px solid var(--line); border-radius: 6px; max-width: 100%; }
table { border-collapse: collapse; font-size: .82rem; font-variant-numeric: tabular-nums; overflow-wrap: normal; }
th, td { padding: .28rem .6rem; text-align: left; vertical-align: top; border-bottom: 1px solid #edf0f3; }
td.n, th.n { text-align: right; white-space: nowrap; }
td.t { min-width: 7rem; max-width: 24rem; }
thead th { position: sticky; top: 0; background: var(--panel); white-space: nowrap; }
.facts th { font-weight: 600; white-space: nowrap; }
.facts td { overflow-wrap: anywhere; }
.facts { width: 100%; }
.answers { display: grid; grid-template-columns: repeat(auto-fit, minmax(15rem, 1fr)); gap: .7rem;
  margin: .4rem 0 .6rem; }
.answer { background: var(--panel); border-top: 3px solid #8a94a0; border-radius: 4px;
  padding: .5rem .8rem .7rem; font-size: .9rem; }
.answer.bad { border-top-color: #b2182b; } .answer.sound { border-top-color: #2166ac; }
.answer h4 { margin: 0 0 .3rem; font-size: .82rem; color: var(--soft); font-weight: 600; }
.answer div { white-space: pre-wrap; }
dt { font-weight: 600; margin-top: .6rem; } dd { margin: 0 0 .2rem; max-width: 72ch; }
.asked > summary { font-weight: 600; font-size: 1rem; color: var(--ink); padding: .45rem 0; }
pre { overflow: auto; max-height: 24rem; background: var(--panel); border-radius: 6px; padding: .7rem .9rem;
  font-size: .8rem; line-height: 1.45; }
code { font-size: .92em; }
@media (max-width: 620px) {
  main { padding: 18px 14px 40px; }
  h1 { font-size: 1.4rem; }
  .findings > li { grid-template-columns: 1fr; }
  .chip { margin-bottom: .35rem; }
  .facts th { white-space: normal; }
}
@media print {
  body { font-size: 11pt; } main { max-width: none; padding: 0; }
  nav, .tools, details:not([open]) { display: none; }
  .findings > li, .figure, .answer { break-inside: avoid; } h2 { break-after: avoid; }
  .scroll { max-height: none; overflow: visible; }
  .chip { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
}
"""

DRAW = """
addEventListener("beforeprint", () => document.querySelectorAll(".evidence").forEach((each) => { each.open = true; }));
for (const box of document.querySelectorAll("[data-figure]")) {
  const spec = JSON.parse(document.getElementById(box.dataset.figure).textContent);
  Plotly.newPlot(box, spec.data, spec.layout, CONFIG);
}
"""
