"""Functions that run at the same time."""

import threading


def in_threads(*functions):
    """Run functions at the same time, step by step in turn; give their results."""
    results, failures = [None] * len(functions), []

    def work(index, function):
        try:
            results[index] = function()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=item) for item in enumerate(functions)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=600)
    assert not failures, failures
    return results
