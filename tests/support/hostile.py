"""Strings that try to be more than text: markup, scripts, templates, formulas, and what a terminal obeys."""

from __future__ import annotations

import unicodedata
from html.parser import HTMLParser

HIT = "window.hit=1"
"""What a script does that was let in."""
GONE = "http://127.0.0.1:9/gone"
"""What is asked for by markup that was let in."""

STRINGS = [
    # markup that ends what is around it, and runs
    f"<script>{HIT}</script>",
    f"</script><script>{HIT}</script>",
    f"<SCRIPT SRC={GONE}.js></SCRIPT>",
    f"<img src=x onerror={HIT}>",
    f'"><img src=x onerror={HIT}>',
    f"'><img src=x onerror={HIT}>",
    f"`><img src=x onerror={HIT}>",
    f"</pre></code><img src=x onerror={HIT}>",
    f"</style><script>{HIT}</script>",
    f"</title></textarea></noscript><svg onload={HIT}>",
    f"</td></tr></table></div></div></div><img src=x onerror={HIT}>",
    f"</summary></details><details open ontoggle={HIT}>",
    f"--><img src=x onerror={HIT}><!--",
    f"]]><img src=x onerror={HIT}>",
    f"<svg><script>{HIT}</script></svg>",
    f"</text></svg><svg onload={HIT}>",
    f"<math><mtext><table><mglyph><style><img src=x onerror={HIT}>",
    f"<iframe srcdoc='<script>parent.{HIT}</script>'></iframe>",
    f"<iframe src=javascript:parent.{HIT}></iframe>",
    f"<object data={GONE}></object><embed src={GONE}>",
    f"<video><source onerror={HIT}></video>",
    f"<audio src={GONE} autoplay>",
    f"<body onload={HIT}>",
    f"<a href=javascript:{HIT} autofocus onfocus={HIT}>x</a>",
    f"<form action={GONE}><button autofocus onfocus={HIT}>x</button></form>",
    f"<img\x00src=x\x0conerror={HIT}>",
    f"<<script>{HIT}//<</script>",
    # attributes
    f'" onmouseover="{HIT}" autofocus onfocus="{HIT}" x="',
    f"' style='position:fixed;inset:0' onfocus='{HIT}",
    '" style="position:fixed;inset:0;background:red',
    # what asks for something, or changes the page
    f"<link rel=stylesheet href={GONE}.css>",
    f"<style>@import '{GONE}.css'; *{{display:none!important}}</style>",
    f"<meta http-equiv=refresh content='0;url={GONE}'>",
    f"<base href={GONE}>",
    f"<div style='background:url({GONE});position:fixed;inset:0;z-index:9999'>",
    # for who decodes twice
    f"&lt;img src=x onerror={HIT}&gt;",
    f"&#60;img src=x onerror={HIT}&#62;",
    f"\\x3cimg src=x onerror={HIT}\\x3e",
    f"%3Cscript%3E{HIT}%3C/script%3E",
    # templates, Markdown, formulas, rich's markup
    "{{ 7 * 7 }}{% raw %}{# #}{{ cycler.__init__.__globals__ }}",
    f"```\n<img src=x onerror={HIT}>\n```",
    f"![x]({GONE}.png) [x](javascript:{HIT})",
    f"$\\href{{javascript:{HIT}}}{{x}}$",
    "$$\\rule{9999em}{9999em}$$",
    "\\(\\style{position:fixed;inset:0;background:red}{x}\\)",
    f"[link={GONE}][blink]x[/blink][/link]",
    # what a terminal obeys
    "\x1b[31mred\x1b[8mhidden",
    "\x1b]0;title\x07",
    f"\x1b]8;;{GONE}\x1b\\link\x1b]8;;\x1b\\",
    "\x1b[2J\x1b[H\x1b[1A\x1b[K",
    "\x9b31m\x9d0;title\x9c\x90q\x9c",
    "a\rb\x08c\x7f\x00\x07\x0b",
    # what turns text around, hides it, or breaks lines
    "\u202eesrever\u202c \u2066isolated\u2069 \u061c\u200f",
    "in\u200bvis\ufeffi\u00adble\U000e0041\u2060",
    "one\u2028two\u2029three\x85four",
    "lone \ud800 surrogate",
    "y\n\nnet · draw 1 of seed 0 · identical",
    "Z" + "\u0301" * 60,
    "W" * 3000,
    "\uff37" * 300,
]
HIDDEN = {"Cc", "Cf", "Cs", "Zl", "Zp"}
"""Categories of characters that a terminal obeys, or that nobody sees."""

TAGS = {
    *("div", "style", "span", "strong", "table", "caption", "thead", "tbody", "tr", "th", "td", "br", "wbr"),
    *("details", "summary", "pre", "code", "svg", "g", "path", "text", "polyline", "circle"),
}
ATTRIBUTES = {
    *(
        "class",
        "style",
        "scope",
        "open",
        "role",
        "aria-label",
        "aria-hidden",
        "viewbox",
        "fill",
        "stroke",
        "x",
        "y",
        "d",
    ),
    *("stroke-width", "stroke-dasharray", "stroke-linejoin", "stroke-linecap", "text-anchor", "opacity", "points"),
    *("font-size", "cx", "cy", "r", "colspan"),
}


def hidden(text: str) -> set[str]:
    """The characters of a text that must not be in it."""
    return {character for character in text if character != "\n" and unicodedata.category(character) in HIDDEN}


class Markup(HTMLParser):
    """The markup of a report that no report writes."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.foreign: list[object] = list(hidden(html))
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = " ".join(value or "" for _, value in attrs)
        own = tag in TAGS and {name for name, _ in attrs} <= ATTRIBUTES
        if not own or "url(" in values or "position" in values:
            self.foreign.append((tag, attrs))

    def handle_comment(self, data: str) -> None:
        self.foreign.append(data)

    handle_decl = unknown_decl = handle_pi = handle_comment


CELLS = (
    f"""\
%load_ext flax_magics
import flax.linen as nn, jax, jax.numpy as jnp, numpy as np, optax
strings = {STRINGS!a}
names = [s for s in strings if s.encode('utf-8', 'ignore').decode() == s]  # Flax encodes them
x = jnp.ones((2, 4))
shell = get_ipython()""",
    """\
%%flaxmodel
class Net(nn.Module):
  label: str
  parts: dict
  @nn.compact
  def __call__(self, x, how=None):
    outputs = {}
    for s, part in self.parts.items():
      y = outputs[s] = part(x)
      if how is not None:  # in eager runs: XLA would take a minute
        self.make_rng(s)
        self.variable('batch_stats', s, jnp.zeros, ()).value += 1
        self.variable(s, s, jnp.zeros, ()).value += 1
        self.sow('intermediates', s, y)
    if how == 'fail':
      raise ValueError(self.label)
    return outputs

def loss(net, batch):
  outputs = net(batch)
  return sum((y ** 2).mean() for y in outputs.values()), {s: y.mean() for s, y in outputs.items()}

net = Net('', {s: nn.Dense(2) for s in names})
for n, s in enumerate(names):
  globals()[f'net{n}'] = Net(s, {s: nn.Dense(2)})""",
    "%config FlaxMagics.report = 'details'\n%flax_apply --eager net(x, dict.fromkeys(names));",
    "for s in strings:\n  %flax_apply --eager net0(x, s);\n"
    "for n in range(len(names)):\n  shell.run_line_magic('flax_apply', f'--eager net{n}(x);')",
    "%flax_grad loss(net, x);",
    "%flax_train --optimizer optax.sgd(0.1) --steps 3 --eval x loss(net, x);",
    "%flax_summary net(x);",
    "%flax_history",
    "%flax",
    "%flax_save s.safetensors\n%flax_load s.safetensors",
    """\
for s in strings:
  for line in ('%flax_key {}', '%flax_load {}'):
    try:
      shell.run_line_magic(*line[1:].format(s.replace('\\n', ' ')).split(' ', 1))
    except Exception:
      shell.showtraceback()""",
    "for n in range(len(names)):\n  try:\n    shell.run_line_magic('flax_apply', f\"net{n}(x, 'fail')\")\n"
    "  except ValueError:\n    shell.showtraceback()",
    "%flax_export --plain",
)
"""A notebook of them, in all places of its reports and messages."""
