"""What is imported when: nobody waits for, or imports, what only another part of the package or of Flax needs."""

from __future__ import annotations

from processes import printed_by


def test_the_package_and_what_reads_the_command_line_import_neither_jax_nor_flax_nor_ipython():
    script = """
        import sys
        import flax_magics.line.options, flax_magics.line.call, flax_magics.notebook.run_cell
        import flax_magics.notebook.tracebacks, flax_magics.notebook.interrupts, flax_magics.notebook.completion
        print(sorted({"jax", "jaxlib", "flax", "optax", "numpy", "IPython"} & set(sys.modules)))
    """
    assert printed_by(script, "-W", "error") == "[]\n"


def test_the_names_that_need_jax_import_it_when_they_are_asked_for():
    script = "import flax_magics; print(flax_magics.Session(seed=3).seed, flax_magics.Run.__name__)"
    assert printed_by(script, "-W", "error") == "3 Run\n"


def test_loading_the_extension_imports_nothing_that_only_a_command_needs():
    script = """
        import sys
        from IPython.core.interactiveshell import InteractiveShell
        shell = InteractiveShell.instance()
        before = set(sys.modules)
        shell.run_line_magic("load_ext", "flax_magics")
        print(*sorted(set(sys.modules) - before))
    """
    imported = set(printed_by(script).split())
    ours = {name for name in imported if name.startswith("flax_magics")}
    packages = {
        "flax_magics",
        *(f"flax_magics.{room}" for room in ("base", "cells", "code", "line", "notebook")),
    }
    assert ours - packages == {
        *("flax_magics.errors", "flax_magics.base.text", "flax_magics.base.tokens"),
        *("flax_magics.base.types", "flax_magics.cells.journal", "flax_magics.code.library"),
        *(
            "flax_magics.line.call",
            "flax_magics.line.commands",
            "flax_magics.line.expression",
        ),
        *("flax_magics.line.options", "flax_magics.notebook.command", "flax_magics.notebook.completion"),
        *("flax_magics.notebook.extension", "flax_magics.notebook.interrupts", "flax_magics.notebook.magics"),
        "flax_magics.notebook.notebook",
        *("flax_magics.notebook.reporter", "flax_magics.notebook.run_cell", "flax_magics.notebook.tracebacks"),
    }
    others = {name.partition(".")[0] for name in imported - ours} - {"IPython"}
    assert others <= {"_blake2", "_hashlib", "bdb", "hashlib"}


def test_the_cell_that_imports_jax_and_flax_imports_what_a_first_run_needs_and_the_first_html_imports_jinja2():
    script = """
        import sys
        from IPython.core.interactiveshell import InteractiveShell
        shell = InteractiveShell.instance()
        def known():
            return [name in sys.modules for name in ("flax_magics._session", "statistics", "jinja2")]
        shell.run_cell("%load_ext flax_magics")
        shell.run_cell("import flax.linen as nn; net = nn.Dense(3)")
        print(known())
        sys.stdout = sys.stderr
        shell.run_cell("%flaxmodel net")
        sys.stdout = sys.__stdout__
        print(known())
    """
    assert printed_by(script) == "[True, False, False]\n[True, False, True]\n"


def test_a_run_of_a_linen_model_imports_nothing_of_nnx():
    script = """
        import sys
        import jax.numpy as jnp
        import flax.linen as nn
        import flax_magics

        class Net(nn.Module):
          @nn.compact
          def __call__(self, x):
            return nn.Dropout(0.5, deterministic=False)(nn.Dense(3)(x))

        before = "flax.nnx" in sys.modules
        session = flax_magics.Session()
        session.register("net", Net())
        for rows in (2, 2, 3):
          session.apply("net", jnp.ones((rows, 4)))
        print(before, "flax.nnx" in sys.modules)
    """
    before, after = printed_by(script).split()
    assert after == before
