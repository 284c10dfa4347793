"""One file per subcommand other than `train`."""


def run_subcommand(command, given, load_model, train_step):
    """Run `look`, `probe`, `check`, `fit` or `compare` and import only what it needs.

    Args: given, a dict of flags; load_model, a function from Config to Vlm; train_step, the
    function in sayo_mini. Returns: the exit code. Raises: InputError.
    """
    if command == "check":
        from commands.check import check_dataset

        return check_dataset(**given)
    if command == "compare":
        from commands.compare import compare_runs

        return compare_runs(**given)
    if command == "fit":
        from commands.fit import run_fit

        return run_fit(given, train_step)
    if command == "look":
        from commands.look import run_look

        return run_look(given, load_model)
    from commands.probe import run_probe

    return run_probe(given, load_model)
