"""The kinds of sharp bits, by the names under which `%config FlaxMagics.notes` quiets them. Imports nothing."""

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
    "zero params": "all params are zero after init",
    "nan params": "params hold NaN after init",
    "scalar": "a Python number stands where an array was",
    "programs": "new programs keep being compiled for other shapes, dtypes or values of an argument",
    "masks": "with the keys of an earlier draw, a layer drew other numbers than in that draw's run",
    "replaced": "an init replaced weights that were set, loaded, trained or updated",
    "weights": "a name that held the model's weights holds others now, and the run used the model's",
    "outdated": "variables are from before an edit",
    "file": "a name stands for another module than was registered, and variables from a file wait for it",
    "rebound": "the name stands for another module than was registered",
}
