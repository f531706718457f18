"""A pytest plugin: the suite on two to four cores, by as many forks of a pytest that has collected its tests.

Each fork takes the next file that none has taken, and the first process says what it reports. The
specification counts as one file, since what failed in a section is named by the sections that build on it.
One process runs all where a person or a flag watches it (-x, -s, --pdb, ...), where the system is not Linux,
and where there is a GPU, since CUDA does not survive a fork.
"""

import itertools
import multiprocessing.connection
import os
import sys
import warnings

import torch

MOST = 4  # processes, of about a gigabyte each
ALONE = ("collectonly", "maxfail", "usepdb", "trace", "setupshow", "setuponly")  # options of pytest


def pytest_runtestloop(session):
    option, config = session.config.option, session.config
    groups = sorted(grouped(session.items), key=len, reverse=True)  # those of many tests first
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else 1
    n = min(MOST, cores, len(groups))
    alone = any(getattr(option, name) for name in ALONE) or option.capture == "no"
    alone = alone or config.getoption("--hypothesis-show-statistics")
    if n < 2 or alone or session.testsfailed or torch.cuda.is_available():
        return None  # pytest's own loop
    queue, end = os.pipe()
    os.write(end, bytes(range(len(groups))))
    os.close(end)
    config._tmp_path_factory.getbasetemp()  # one folder for all of them
    fork, workers = multiprocessing.get_context("fork"), {}
    try:
        for _ in range(n):
            reports, pipe = fork.Pipe(duplex=False)
            ends = [
                *workers,
                reports,
            ]  # of the first process: a fork that kept them would not see it end
            workers[reports] = fork.Process(target=work, args=(session, groups, queue, pipe, ends))
            workers[reports].start()
            pipe.close()
        listen(session, dict(workers))
    finally:
        for worker in workers.values():
            worker.kill()  # a command that it runs would take any other signal for its own
            worker.join()
    return True


def grouped(items):
    """The tests of each file, and those of the whole specification."""
    return [list(group) for _, group in itertools.groupby(items, key=lambda item: (
        item.path.parent if item.path.parent.name == "specification" else item.path))]  # fmt: skip


def work(session, groups, queue, pipe, ends):
    """Runs the groups that it takes from the queue, and sends what is reported of them."""
    for reports in ends:
        reports.close()
    plugins = session.config.pluginmanager
    plugins.unregister(name="terminalreporter")
    plugins.register(Sender(session.config, pipe))
    capture = plugins.getplugin("capturemanager")
    capture.stop_global_capturing()  # its files are shared with the other forks
    capture.start_global_capturing()
    capture.suspend_global_capture()
    numbers = itertools.takewhile(bool, (os.read(queue, 1) for _ in itertools.count()))
    items = itertools.chain.from_iterable(groups[number[0]] for number in numbers)
    try:
        for item, following in itertools.pairwise(itertools.chain(items, [None])):
            pipe.send(("running", item.nodeid))
            session.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
    except KeyboardInterrupt:  # the first process had it too, or says that this one ended
        os._exit(130)
    except BrokenPipeError:  # the first process is gone
        pass


class Sender:
    """What a fork sends of its tests."""

    def __init__(self, config, pipe):
        self.config, self.pipe = config, pipe

    def pytest_runtest_logreport(self, report):
        data = self.config.hook.pytest_report_to_serializable(config=self.config, report=report)
        self.pipe.send(("report", data))

    def pytest_warning_recorded(self, warning_message, when, nodeid, location):
        what = str(warning_message.message), warning_message.category.__name__
        where = warning_message.filename, warning_message.lineno
        self.pipe.send(
            ("warning", (*what, *where, dict(when=when, nodeid=nodeid, location=location)))
        )


def listen(session, workers):
    """Says what the forks report, until each has ended. Raises pytest's Failed if one broke down, or if a
    test was not run to its end."""
    hook, running, left = session.config.hook, {}, {item.nodeid for item in session.items}
    if terminal := session.config.pluginmanager.getplugin("terminalreporter"):
        terminal.showfspath = False  # their files alternate
    while workers:
        for reports in multiprocessing.connection.wait(list(workers)):
            try:
                kind, data = reports.recv()
            except EOFError:
                worker = workers.pop(reports)
                worker.join()
                if worker.exitcode:
                    where = running.get(reports, "its beginning")
                    fail(session, f"a process ended with {worker.exitcode} in {where}")
                continue
            if kind == "running":
                running[reports] = data
            elif kind == "warning":
                text, name, filename, line, how = data
                message = warnings.WarningMessage(text, type(name, (Warning,), {}), filename, line)
                hook.pytest_warning_recorded.call_historic(
                    kwargs=dict(how, warning_message=message)
                )
            else:
                report = hook.pytest_report_from_serializable(config=session.config, data=data)
                hook.pytest_runtest_logreport(report=report)
                left -= {report.nodeid} if report.when == "teardown" else set()
    if left:
        fail(session, f"{len(left)} tests were not run to their end, such as {min(left)}")


def fail(session, words):
    session.shouldfail = words  # what pytest prints
    raise session.Failed(words)
