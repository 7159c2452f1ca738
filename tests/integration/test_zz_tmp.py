from tests.integration.test_covariance import *
def test_w(job):
    a = job.start(halts=(Halt("step",3),), data__num_workers=2, model__tokens=20*BLOCK)
    a.killed()
    b = job.start(data__num_workers=2, model__tokens=20*BLOCK)
    for p in b.processes: p.join()
    print(b.said); assert b.processes[0].exitcode == 0
    print(b.said)
