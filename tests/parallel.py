"""A pytest plugin: the suite on two to four cores, by as many forks of a pytest that has collected its tests.

Each fork takes the next file that none has taken. All that it reports, the first process says as if it had
run the tests itself. The specification counts as one file, since what failed in a section is named by the
sections that build on it. A debugger, -x and -s want one process, and so does a GPU, which does not fork.
"""

import itertools
import multiprocessing.connection
import os
import sys

import torch

MOST = 4  # processes, of about a gigabyte each


def pytest_runtestloop(session):
    option = session.config.option
    groups = sorted(grouped(session.items), key=len, reverse=True)  # the longest first
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else 1
    n = min(MOST, cores, len(groups))
    alone = option.collectonly or option.maxfail or option.usepdb or option.capture == "no"
    if n < 2 or alone or session.testsfailed or torch.cuda.is_available():
        return None  # pytest's own loop
    queue, end = os.pipe()
    os.write(end, bytes(range(len(groups))))
    os.close(end)
    session.config._tmp_path_factory.getbasetemp()  # one folder for all of them
    fork, workers = multiprocessing.get_context("fork"), {}
    try:
        for _ in range(n):
            reports, pipe = fork.Pipe(duplex=False)
            workers[reports] = fork.Process(target=work, args=(session, groups, queue, pipe))
            workers[reports].start()
            pipe.close()
        listen(session, dict(workers))
    finally:
        for worker in workers.values():
            worker.terminate()
    return True


def grouped(items):
    """The tests of each file, and those of the whole specification."""
    return [list(group) for _, group in itertools.groupby(items, key=lambda item: (
        item.path.parent if item.path.parent.name == "specification" else item.path))]  # fmt: skip


def work(session, groups, queue, pipe):
    """Runs the groups that it takes from the queue, and sends what is reported of them."""
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
    except (KeyboardInterrupt, BrokenPipeError):  # the first process says so, or is gone
        pass


class Sender:
    """What a fork sends of its tests."""

    def __init__(self, config, pipe):
        self.config, self.pipe = config, pipe

    def pytest_runtest_logreport(self, report):
        data = self.config.hook.pytest_report_to_serializable(config=self.config, report=report)
        self.pipe.send(("report", data))

    def pytest_warning_recorded(self, warning_message, when, nodeid, location):
        self.pipe.send(("warning", dict(warning_message=warning_message, when=when, nodeid=nodeid,
                                        location=location)))  # fmt: skip


def listen(session, workers):
    """Says what the forks report, until each has ended. Raises pytest's Failed if one broke down."""
    hook, running = session.config.hook, {}
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
                    raise session.Failed(f"a process ended with {worker.exitcode} in {where}") from None
                continue
            if kind == "running":
                running[reports] = data
            elif kind == "warning":
                hook.pytest_warning_recorded.call_historic(kwargs=data)
            else:
                report = hook.pytest_report_from_serializable(config=session.config, data=data)
                hook.pytest_runtest_logreport(report=report)
