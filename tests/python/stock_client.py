"""A client that is not ours: grpcio, with what protoc makes of proto/, and nothing of coldspark's but that.

    protoc -Iproto --python_out=OUT --grpc_python_out=OUT --plugin=protoc-gen-grpc_python=$(command -v grpc_python_plugin) proto/coldspark/v1/*.proto
    PYTHONPATH=OUT python3 tests/python/stock_client.py /run/coldspark.sock

Ends with status 0 if every answer was what the .proto files promise.
"""

import sys
import threading
import time
import uuid

import grpc
from coldspark.v1 import agent_pb2, agent_pb2_grpc
from coldspark.v1 import functions_pb2, functions_pb2_grpc
from coldspark.v1 import pools_pb2, pools_pb2_grpc
from coldspark.v1 import snapshots_pb2, snapshots_pb2_grpc
from coldspark.v1 import vms_pb2, vms_pb2_grpc

SECONDS = 60


def connect(path):
    # grpcio makes an authority of the socket's path that HTTP/2 servers refuse.
    return grpc.insecure_channel(f"unix:{path}", options=[("grpc.default_authority", "localhost")])


def refused(code, reason, words, call, request, **options):
    """The call fails with this code, this reason for programs, and a sentence with these words."""
    try:
        answer = call(request, timeout=SECONDS, **options)
        if hasattr(answer, "__next__"):
            list(answer)
    except grpc.RpcError as error:
        assert error.code() == code, f"{error.code()} instead of {code}: {error.details()}"
        assert words in error.details(), f"{error.details()!r} does not say {words!r}"
        # A google.rpc.Status with an ErrorInfo; its classes are in a package that need not be here.
        details = dict(error.trailing_metadata())["grpc-status-details-bin"]
        assert reason.encode() in details and b"google.rpc.ErrorInfo" in details, details
        return
    raise AssertionError(f"{request} was not refused")


def boot(vms):
    """Cold-boots the embedded guest; the events come in the order that the .proto promises."""
    events = list(vms.CreateVm(vms_pb2.CreateVmRequest(embedded=True, memory_bytes=64 << 20), timeout=SECONDS))
    assert events[0].HasField("accepted") and events[-1].HasField("ready"), events
    assert events[-1].ready.state == vms_pb2.VM_STATE_READY
    return events[-1].ready


def clones(vms, agent):
    generations = set()
    first_call = agent_pb2.AgentCallRequest(generation=agent_pb2.GenerationOp())
    for _ in range(3):
        request = vms_pb2.CloneVmRequest(snapshot="base", first_call=first_call, request_id=str(uuid.uuid4()))
        answer = vms.CloneVm(request, timeout=SECONDS)
        assert vms.CloneVm(request, timeout=SECONDS) == answer, "the same request, another answer"
        (vm,) = answer.vms
        assert answer.answer.generation.generation == vm.generation
        generations.add(vm.generation)
        echo = agent_pb2.AgentCallRequest(vm=vm.id, echo=agent_pb2.EchoOp(data=b"hello"))
        assert agent.Call(echo, timeout=SECONDS).echo.data == b"hello"
        vms.DeleteVm(vms_pb2.DeleteVmRequest(vm=vm.id), timeout=SECONDS)
        refused(grpc.StatusCode.NOT_FOUND, "VM_NOT_FOUND", "vm ls", vms.GetVm, vms_pb2.GetVmRequest(vm=vm.id))
    assert len(generations) == 3, "clones with the same generation"


def commands(agent, vm):
    """A command with streams both ways."""
    def requests():
        start = agent_pb2.ExecStart(vm=vm.id, args=["upper"])
        yield agent_pb2.ExecRequest(start=start)
        for word in (b"one ", b"two"):
            yield agent_pb2.ExecRequest(stdin=word)
        yield agent_pb2.ExecRequest(stdin_end=True)

    stdout, status = b"", None
    for response in agent.Exec(requests(), timeout=SECONDS):
        stdout += response.stdout
        if response.HasField("exit"):
            status = response.exit.status
    assert (stdout, status) == (b"ONE TWO", 0), (stdout, status)


def pools(stub, vms):
    stub.CreatePool(
        pools_pb2.CreatePoolRequest(name="py", snapshot="base", mode=pools_pb2.POOL_MODE_PAUSED, min_ready=1, max=2),
        timeout=SECONDS,
    )
    taken = [stub.TakeVm(pools_pb2.TakeVmRequest(pool="py"), timeout=SECONDS).vm for _ in range(2)]
    assert taken[0].id != taken[1].id and taken[0].pool == "py"
    refused(grpc.StatusCode.RESOURCE_EXHAUSTED, "POOL_FULL", "--max", stub.TakeVm, pools_pb2.TakeVmRequest(pool="py"))
    stub.DeletePool(pools_pb2.DeletePoolRequest(pool="py"), timeout=SECONDS)
    for vm in taken:
        vms.DeleteVm(vms_pb2.DeleteVmRequest(vm=vm.id), timeout=SECONDS)


def functions(stub):
    handler = functions_pb2.GuestCommand(args=["upper"])
    request = functions_pb2.DeployRequest(
        name="shout", snapshot="base", settings=functions_pb2.FunctionSettings(handler=handler)
    )
    events = list(stub.Deploy(request, timeout=SECONDS))
    assert events[-1].function.revision == 1, events
    invoke = functions_pb2.InvokeRequest(function="shout", payload=b"hello")
    answer = stub.Invoke(invoke, timeout=SECONDS)
    assert answer.output == b"HELLO" and answer.end.exit_status == 0, answer
    assert answer.end.timings.run_us > 0

    def requests():
        yield functions_pb2.InvokeStreamRequest(start=functions_pb2.InvokeStart(function="shout"))
        yield functions_pb2.InvokeStreamRequest(stdin=b"streamed")

    responses = list(stub.InvokeStream(requests(), timeout=SECONDS))
    assert b"".join(response.stdout for response in responses) == b"STREAMED", responses
    stub.DeleteFunction(functions_pb2.DeleteFunctionRequest(function="shout"), timeout=SECONDS)


def cut_off(stub):
    """What a caller cancels in the middle of its stdin has not ended: no handler takes the part for the whole."""
    handler = functions_pb2.GuestCommand(args=["cat"])
    settings = functions_pb2.FunctionSettings(handler=handler)
    list(stub.Deploy(functions_pb2.DeployRequest(name="cut", snapshot="base", settings=settings), timeout=SECONDS))
    times = 10
    for _ in range(times):
        held = threading.Event()

        def requests():
            yield functions_pb2.InvokeStreamRequest(start=functions_pb2.InvokeStart(function="cut"))
            yield functions_pb2.InvokeStreamRequest(stdin=b"a part")
            held.wait(SECONDS)

        call = stub.InvokeStream(requests(), timeout=SECONDS)
        assert next(call).stdout == b"a part"
        call.cancel()
        held.set()
    deadline = time.monotonic() + SECONDS
    while (seen := stub.GetFunction(functions_pb2.GetFunctionRequest(function="cut"), timeout=SECONDS)).running:
        assert time.monotonic() < deadline, f"still running: {seen}"
    assert (seen.cancelled, seen.succeeded) == (times, 0), seen
    stub.DeleteFunction(functions_pb2.DeleteFunctionRequest(function="cut"), timeout=SECONDS)


def deadlines(vms):
    """What is waited for no longer is ended by the service: no VM is left."""
    ready = vms_pb2.CreateVmRequest(embedded=True)
    ready.ready.console_pattern = "this is never printed"
    try:
        list(vms.CreateVm(ready, timeout=1))
    except grpc.RpcError as error:
        assert error.code() == grpc.StatusCode.DEADLINE_EXCEEDED, error
    else:
        raise AssertionError("it became ready")


def lists(vms):
    """Pages: each VM once, in a page of its own."""
    made = {boot(vms).id for _ in range(3)}
    seen, token = [], ""
    while True:
        page = vms.ListVms(vms_pb2.ListVmsRequest(page_size=1, page_token=token), timeout=SECONDS)
        assert len(page.vms) == 1, page
        seen += [vm.id for vm in page.vms]
        token = page.next_page_token
        if not token:
            break
    assert len(seen) == 3 and set(seen) == made, (seen, made)
    wrong = vms_pb2.ListVmsRequest(page_token="not ours")
    refused(grpc.StatusCode.INVALID_ARGUMENT, "INVALID_REQUEST", "page_token", vms.ListVms, wrong)
    for vm in made:
        vms.DeleteVm(vms_pb2.DeleteVmRequest(vm=vm), timeout=SECONDS)


def main(path):
    with connect(path) as channel:
        vms = vms_pb2_grpc.VmServiceStub(channel)
        agent = agent_pb2_grpc.AgentServiceStub(channel)
        snapshots = snapshots_pb2_grpc.SnapshotServiceStub(channel)
        refused(grpc.StatusCode.INVALID_ARGUMENT, "INVALID_REQUEST", "vCPUs", vms.CreateVm, vms_pb2.CreateVmRequest(embedded=True, vcpus=99))
        vm = boot(vms)
        commands(agent, vm)
        taken = snapshots.CreateSnapshot(snapshots_pb2.CreateSnapshotRequest(vm=vm.id, name="base"), timeout=SECONDS)
        assert taken.snapshot.agent and taken.pause_us > 0
        vms.DeleteVm(vms_pb2.DeleteVmRequest(vm=vm.id), timeout=SECONDS)
        clones(vms, agent)
        pools(pools_pb2_grpc.PoolServiceStub(channel), vms)
        functions(functions_pb2_grpc.FunctionServiceStub(channel))
        cut_off(functions_pb2_grpc.FunctionServiceStub(channel))
        lists(vms)
        deadlines(vms)
    print("all good")


if __name__ == "__main__":
    main(sys.argv[1])
