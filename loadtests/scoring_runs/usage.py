"""How much processor time processes have used."""

import psutil


def cpu_s(process: psutil.Process) -> float:
    """Return the processor time in seconds that a process and all that it ever started have used, as far as known.

    What has ended counts once its parent has waited for it.
    """
    try:
        times = process.cpu_times()
        own = float(times.user + times.system + times.children_user + times.children_system)
        return own + sum(cpu_s(child) for child in process.children())
    except psutil.NoSuchProcess:  # ended just now, as Postgres' processes often do
        return 0.0
