"""The parts of `benchmarks.demo_cluster`: a run on the hosts, the time to a loss, the
page.
"""
