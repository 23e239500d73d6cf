"""The first run in marimo, by `flax_magics.Session`: `marimo run examples/first_run_marimo.py`, or `marimo edit`."""

import marimo

app = marimo.App()


@app.cell
def _():
    import flax.linen as nn
    import jax.numpy as jnp
    import optax

    import flax_magics

    return flax_magics, jnp, nn, optax


@app.cell
def _(flax_magics, jnp, nn):
    class MyModel(nn.Module):
        num_neurons: int
        training: bool

        @nn.compact
        def __call__(self, x):
            x = nn.Dense(self.num_neurons)(x)
            return nn.Dropout(rate=0.5, deterministic=not self.training)(x)

    # A session begins where its model is defined: when this cell runs again, both are new.
    session = flax_magics.Session(seed=0)
    session.register("my_model", MyModel(num_neurons=3, training=False))
    x = jnp.ones((3, 4, 4))
    return session, x


@app.cell
def _(session, x):
    run = session.apply("my_model", x, mode="train")
    run
    return (run,)


@app.cell
def _(run, session, x):
    run  # marimo runs a cell after those whose names it uses: draws come in this order
    session.summary("my_model", x)
    return


@app.cell
def _(optax, run, session, x):
    def loss(net, batch):
        return (net(batch) ** 2).mean()

    run
    training = session.train(loss, "my_model", x, optimizer=optax.adam(0.1), steps=20)
    training
    return (training,)


@app.cell
def _(session, training):
    training
    session.history()
    return


if __name__ == "__main__":
    app.run()
