"""Whether a server or an implementation still computes the model: the accuracy gate and tasks for
any server."""
