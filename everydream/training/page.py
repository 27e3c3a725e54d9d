"""The report's page: its look and its few lines of script. Light or dark as the reader's system is."""

from __future__ import annotations

from string import Template

STYLE = """
:root { color-scheme: light dark; --ground: #fbfbfa; --card: #fff; --ink: #1c1d21; --faint: #6c6f78; --edge: #e4e4e1;
  --c0: #3257d6; --c1: #d9622b; --c2: #16866f; --c3: #8d4bbd; --good: #16866f; --bad: #c23434; --busy: #3257d6; }
@media (prefers-color-scheme: dark) { :root { --ground: #15161a; --card: #1d1f24; --ink: #e8e8ea; --faint: #9a9da7;
  --edge: #30323a; --c0: #7f9bff; --c1: #f39a6b; --c2: #4dc4a8; --c3: #c48ff0; --good: #4dc4a8; --bad: #ff7b7b;
  --busy: #7f9bff; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 1180px; margin: 0 auto; padding: 32px 24px 64px; }
h1 { font-size: 26px; margin: 4px 0 12px; letter-spacing: -.01em; overflow-wrap: anywhere; }
h2 { font-size: 18px; margin: 40px 0 14px; } h2 small, h3 small { font-weight: 400; color: var(--faint); }
h3 { font-size: 14px; margin: 0; }
code { font: 13px ui-monospace, Menlo, Consolas, monospace; overflow-wrap: anywhere; }
.faint, dt, th, .tick { color: var(--faint); } .faint { margin: 8px 0; font-size: 13px; }
.state { display: inline-block; margin: 0; padding: 1px 10px; border-radius: 99px; font-size: 13px; color: #fff; }
.state.running { background: var(--busy); } .state.done { background: var(--good); }
.state.failed { background: var(--bad); }
@media (prefers-color-scheme: dark) { .state { color: #15161a; } }
.bar { height: 6px; border-radius: 3px; background: var(--edge); overflow: hidden; }
.bar i { display: block; height: 100%; background: var(--busy); }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 1px; margin: 24px 0 0;
  background: var(--card); border: 1px solid var(--edge); border-radius: 10px; overflow: hidden; }
.figures div { padding: 12px 16px; box-shadow: 0 0 0 1px var(--edge); }
dt { font-size: 12px; }
dd { margin: 2px 0 0; font-size: 21px; font-variant-numeric: tabular-nums; white-space: nowrap; }
dd small { font-size: 12px; color: var(--faint); }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(420px, 100%), 1fr)); gap: 16px; }
.chart, #previews, .plan > div, .warnings li { margin: 0; padding: 14px 16px; background: var(--card);
  border: 1px solid var(--edge); border-radius: 10px; }
figcaption { display: flex; flex-wrap: wrap; justify-content: space-between; gap: 4px 16px; margin-bottom: 6px; }
.legend { display: flex; flex-wrap: wrap; gap: 2px 14px; font-size: 12px; color: var(--faint); }
.legend i { display: inline-block; width: 14px; height: 3px; border-radius: 2px; margin-right: 5px; vertical-align: 3px;
  background: var(--c); }
.legend b { color: var(--ink); font-variant-numeric: tabular-nums; }
svg { display: block; width: 100%; height: auto; } .tick { font-size: 11px; fill: var(--faint); }
.grid { stroke: var(--edge); } .cross { stroke: var(--faint); stroke-dasharray: 3 3; visibility: hidden; }
.c0 { --c: var(--c0); } .c1 { --c: var(--c1); } .c2 { --c: var(--c2); } .c3 { --c: var(--c3); } .dot { fill: var(--c); }
.line { fill: none; stroke: var(--c); stroke-width: 1.8; stroke-linejoin: round; }
.faint.line { stroke-width: 1; opacity: .32; }
#previews { padding: 0; overflow: hidden; background: #fafaf8; }
#previews img { display: block; max-width: 100%; margin: 0 auto; }
#previews img[hidden] { display: none; }
.slider { display: flex; flex-wrap: wrap; align-items: center; gap: 12px; margin-bottom: 12px; }
.slider input { flex: 1 1 100px; min-width: 0; accent-color: var(--busy); }
.slider output, .slider button { white-space: nowrap; }
.slider output { min-width: 90px; font-variant-numeric: tabular-nums; }
button { font: inherit; color: inherit; background: var(--card); border: 1px solid var(--edge); border-radius: 6px;
  padding: 2px 10px; cursor: pointer; }
.plan { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(340px, 100%), 1fr)); gap: 16px; }
.plan ul { margin: 8px 0 0; padding-left: 18px; font-size: 13px; } .plan li { white-space: pre-wrap; }
.plan .wide { grid-column: 1 / -1; order: 1; }
.plan pre { margin: 8px 0 0; font: 12px/1.6 ui-monospace, Menlo, Consolas, monospace; overflow-x: auto; }
.warnings { list-style: none; padding: 0; margin: 0; display: grid; gap: 8px; }
.warnings li { border-left: 4px solid var(--c1); }
.warnings p { margin: 2px 0 0; color: var(--faint); white-space: pre-wrap; }
table { width: 100%; border-collapse: collapse; font-size: 13px; } th { text-align: left; font-weight: 400; }
td:last-child { white-space: nowrap; }
td, th { padding: 5px 12px 5px 0; border-bottom: 1px solid var(--edge); vertical-align: top; }
details { margin-top: 12px; } summary { cursor: pointer; color: var(--faint); margin-bottom: 8px; }
"""

SCRIPT = """
for (const figure of document.querySelectorAll("[data-chart]")) {
  const data = JSON.parse(figure.dataset.chart);
  const svg = figure.querySelector("svg"), cross = figure.querySelector(".cross");
  const [low, high, left, right] = data.x, width = svg.viewBox.baseVal.width;
  const show = step => data.lines.forEach((line, i) => {
    const near = line.reduce((a, b) => Math.abs(b[0] - step) < Math.abs(a[0] - step) ? b : a);
    figure.querySelector(`[data-line="${i}"]`).textContent = +near[1].toPrecision(4);
  });
  const leave = () => { cross.style.visibility = "hidden"; show(high); };
  svg.addEventListener("pointermove", event => {
    const box = svg.getBoundingClientRect(), x = (event.clientX - box.left) / box.width * width;
    const inside = Math.min(right, Math.max(left, x));
    cross.setAttribute("x1", inside); cross.setAttribute("x2", inside); cross.style.visibility = "visible";
    show(low + (inside - left) / (right - left) * (high - low));
  });
  svg.addEventListener("pointerleave", leave);
  leave();
}
const slider = document.getElementById("slider");
if (slider) {
  const images = [...document.querySelectorAll("#previews img")], output = document.getElementById("step");
  const show = i => {
    images.forEach((image, n) => image.hidden = n !== i);
    output.textContent = "step " + images[i].dataset.step;
  };
  const move = by => { slider.value = +slider.value + by; show(+slider.value); };
  const first = document.getElementById("first");
  slider.addEventListener("input", () => show(+slider.value));
  document.getElementById("back").onclick = () => move(-1);
  document.getElementById("on").onclick = () => move(1);
  first.addEventListener("pointerdown", () => show(0));
  for (const end of ["pointerup", "pointerleave"]) first.addEventListener(end, () => show(+slider.value));
}
"""

PAGE = Template(
    '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
    '<meta name="viewport" content="width=device-width, initial-scale=1">'
    f"<title>$title</title><style>{STYLE.replace('$', '$$')}</style></head>\n"
    '<body><main><header>$header</header><dl class="figures">$figures</dl>\n$previews\n'
    '<section><h2>Curves</h2><div class="charts">$charts</div></section>\n$warnings\n$plan\n$checkpoints\n$settings\n'
    f"</main><script>{SCRIPT.replace('$', '$$')}</script></body></html>\n"
)
