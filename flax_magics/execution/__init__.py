"""Running a call with a draw: binding it, finding or compiling its program, running that, and making the Run."""
