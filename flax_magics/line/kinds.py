"""The kinds of notes on likely mistakes."""

from __future__ import annotations

KINDS = {
    "dropout": "every dropout is off in training, or on in evaluation",
    "norm": "BatchNorm is in the other mode than was asked",
    "mode": "training or evaluation was asked, and the model has no switch",
    "nan": "the output holds NaN",
    "stream": "a stream that is not Flax's own is asked for",
    "root key": "a key that the session splits is passed to a run",
    "key again": "a key that went into an earlier run is passed again",
    "same key": "one key is given to two arguments of a call",
    "unused key": "a key is passed that the model does not use",
    "mutable": "a collection is asked for by a name that the model does not have",
    "samples": "all samples of a run are the same, because no key went into them",
    "zero params": "all params are zero after init",
    "nan params": "params hold NaN after init",
    "scalar": "a Python number stands where an array was",
    "programs": "new programs keep being compiled for other shapes, dtypes or values of an argument",
    "masks": "with the keys of an earlier draw, a layer drew other numbers than in that draw's run",
    "replaced": "an init or an edit replaced weights that were set, loaded, trained or updated",
    "weights": "a name that held the model's weights holds others now, and the run used the model's",
    "outdated": "variables are from before an edit",
    "file": "a name stands for another module than was registered, and variables from a file wait for it",
    "rebound": "the name stands for another module than was registered",
    "name": "the name of a model was deleted, or holds something that is no module, and the model registered under it ran",
    "switch": "a loss leaves a switch of its net's call at its default",
    "freeze": "a pattern of --freeze matches no parameter",
    "gradient": "a layer has no gradient, and why",
    "constant": "another net in the call of a loss gets no gradient",
    "still": "the loss of a training has not moved in its last 50 steps",
    "stopped": "a training has ended before its last step, and the line that goes on with it",
    "resume": "a training goes on with other data, weights or code than it had, or an iterable that may give other batches",
    "doctor": "in the first report of a kernel, what is wrong with JAX there; see %flax_doctor",
    "mesh": "the last batch of each epoch cannot be cut over the axis `data`",
}
"""Kinds of notes on likely mistakes, by whose names `%config FlaxMagics.notes` turns them off, and when each is said."""
