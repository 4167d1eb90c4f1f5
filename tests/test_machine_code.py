"""Reading machine code: loops, the way over whole vectors, and what is against the rules."""

from __future__ import annotations

import dataclasses

import pytest

from build_tools import cuda_limits, cuda_report
from build_tools.cuda_limits import HotLoop
from build_tools.machine_code import Access, access_of, functions

# What nvdisasm prints, shortened, of nvcc's code for sm_90 of
#
#   for (int i = threadIdx.x; i < n; i += 256) {
#     float4 a = x[i], b = z[i];
#     float sum = 0;
#     for (int j = threadIdx.x; j < m; j++) sum += part[j];  // in shared memory
#     a.x += b.x + sum; a.y += b.y; a.z += b.z; a.w += b.w;
#     if (i > 7) y[i] = a;
#     else odd[i] = a.x, odd[i + 9] = a.y, odd[i + 6] = a.z, odd[i + 8] = a.w;
#   }
LISTING = """\
\t.section\t.text._Z4miniPK6float4S1_PS_Pfii,"ax",@progbits
_Z4miniPK6float4S1_PS_Pfii:
.text._Z4miniPK6float4S1_PS_Pfii:
        /*0000*/   LDC R1, c[0x0][0x28] ;
        /*0010*/   S2R R0, SR_TID.X ;
        /*0020*/   ULDC UR4, c[0x0][0x230] ;
        /*0030*/   ISETP.GE.AND P0, PT, R0, UR4, PT ;
        /*0040*/   @P0 EXIT ;
        /*0050*/   IMAD.MOV.U32 R2, RZ, RZ, R0 ;
        /*0060*/   ULDC.64 UR6, c[0x0][0x208] ;
.L_x_6:
        /*0070*/   LDC.64 R4, c[0x0][0x210] ;
        /*0080*/   LDC.64 R8, c[0x0][0x218] ;
        /*0090*/   LDC R15, c[0x0][0x234] ;
        /*00a0*/   IMAD.WIDE R4, R2, 0x10, R4 ;
        /*00b0*/   LDG.E.128 R4, desc[UR6][R4.64] ;
        /*00c0*/   IMAD.WIDE R8, R2, 0x10, R8 ;
        /*00d0*/   LDG.E.128 R8, desc[UR6][R8.64] ;
        /*00e0*/   ISETP.GE.AND P0, PT, R0, R15, PT ;
        /*00f0*/   BSSY B0, `(.L_x_0) ;
        /*0100*/   IMAD.MOV.U32 R3, RZ, RZ, RZ ;
        /*0110*/   @P0 BRA `(.L_x_1) ;
        /*0120*/   S2UR UR5, SR_CgaCtaId ;
        /*0130*/   UMOV UR4, 0x400 ;
        /*0140*/   HFMA2.MMA R3, -RZ, RZ, 0, 0 ;
        /*0150*/   IMAD.MOV.U32 R13, RZ, RZ, R0 ;
        /*0160*/   ULEA UR4, UR5, UR4, 0x18 ;
        /*0170*/   LEA R12, R0, UR4, 0x2 ;
.L_x_2:
        /*0180*/   LDS R14, [R12] ;
        /*0190*/   IADD3 R13, R13, 0x1, RZ ;
        /*01a0*/   ISETP.GE.AND P0, PT, R13, R15, PT ;
        /*01b0*/   VIADD R12, R12, 0x4 ;
        /*01c0*/   FADD R3, R14, R3 ;
        /*01d0*/   @!P0 BRA `(.L_x_2) ;
.L_x_1:
        /*01e0*/   BSYNC B0 ;
.L_x_0:
        /*01f0*/   ISETP.GT.AND P0, PT, R2, 0x7, PT ;
        /*0200*/   FADD R3, R8, R3 ;
        /*0210*/   BSSY B0, `(.L_x_3) ;
        /*0220*/   FADD R5, R5, R9 ;
        /*0230*/   FADD R6, R6, R10 ;
        /*0240*/   FADD R4, R4, R3 ;
        /*0250*/   FADD R7, R7, R11 ;
        /*0260*/   SHF.R.S32.HI R3, RZ, 0x1f, R2 ;
        /*0270*/   @P0 BRA `(.L_x_4) ;
        /*0280*/   VOTE.ANY R8, PT, PT ;
        /*0290*/   WARPSYNC R8 ;
        /*02a0*/   ULDC.64 UR4, c[0x0][0x228] ;
        /*02b0*/   LEA R8, P0, R2, UR4, 0x2 ;
        /*02c0*/   LEA.HI.X R9, R2, UR5, R3, 0x2, P0 ;
        /*02d0*/   STG.E desc[UR6][R8.64], R4 ;
        /*02e0*/   STG.E desc[UR6][R8.64+0x24], R5 ;
        /*02f0*/   STG.E desc[UR6][R8.64+0x18], R6 ;
        /*0300*/   STG.E desc[UR6][R8.64+0x20], R7 ;
        /*0310*/   BRA `(.L_x_5) ;
.L_x_4:
        /*0320*/   ULDC.64 UR4, c[0x0][0x220] ;
        /*0330*/   LEA R8, P0, R2, UR4, 0x4 ;
        /*0340*/   LEA.HI.X R9, R2, UR5, R3, 0x4, P0 ;
        /*0350*/   STG.E.128 desc[UR6][R8.64], R4 ;
.L_x_5:
        /*0360*/   BSYNC B0 ;
.L_x_3:
        /*0370*/   IADD3 R2, R2, 0x100, RZ ;
        /*0380*/   ULDC UR4, c[0x0][0x230] ;
        /*0390*/   ISETP.GE.AND P0, PT, R2, UR4, PT ;
        /*03a0*/   @!P0 BRA `(.L_x_6) ;
        /*03b0*/   EXIT ;
.L_x_7:
        /*03c0*/   BRA `(.L_x_7);
.L_x_8:
"""


def only(listing=LISTING):
    (function,) = functions(listing)
    return function


def test_a_listing_becomes_functions():
    assert [f.name for f in functions(LISTING)] == ["_Z4miniPK6float4S1_PS_Pfii"]
    other = LISTING.replace("_Z4mini", "_Z5other")
    assert [f.name for f in functions(LISTING + other)][1] == "_Z5otherPK6float4S1_PS_Pfii"
    first = only().instructions[0]
    assert (first.address, first.opcode, first.operands) == (0, "LDC", "R1, c[0x0][0x28]")
    assert len(only().instructions) == 61
    assert [i.guard for i in only().instructions if i.opcode == "EXIT"] == ["@P0", ""]


def test_the_way_is_over_whole_vectors_and_without_the_loop_within():
    (loop,) = only().loops
    addresses = [i.address for i in loop.way]
    edge, within, vector = range(0x280, 0x320), range(0x180, 0x1E0), range(0x320, 0x360)
    assert addresses == [a for a in range(0x70, 0x3B0, 16) if a not in edge and a not in within]
    assert [i.address for i in loop.within] == list(within)[::16]
    assert {a for a in vector if a % 16 == 0} <= set(addresses)
    vectors = [("global", True, 2), ("global", False, 1), ("shared", True, 0), ("copy", True, 0)]
    for space, load, count in vectors:
        assert loop.vectors(space, load) == count
    assert loop.in_flight() == 2


def test_the_way_leads_through_a_loop_that_stores_sums():
    """Also where a way around it has no narrow access of global memory."""
    add = "FADD R3, R14, R3 ;"
    assert LISTING.count(add) == 1
    (loop,) = only(LISTING.replace(add, "STG.E desc[UR6][R8.64], R14 ;")).loops
    assert [i.opcode for i in loop.within].count("STG.E") == 1
    assert [i.address for i in loop.way] == [i.address for i in only().loops[0].way]


def test_nops_do_not_count():
    """As behind each instruction of float64 on 12.0, or after a kernel's end."""
    start = LISTING.index("        /*0200*/")
    padded = LISTING[:start] + "        /*01f8*/   NOP ;\n" * 4 + LISTING[start:]
    assert only(padded) == only()


def test_a_use_between_loads_leaves_one_in_flight():
    wait = "IMAD.WIDE R8, R2, 0x10, R8 ;"
    assert LISTING.count(wait) == 1
    (loop,) = only(LISTING.replace(wait, "IMAD.WIDE R8, R6, 0x10, R8 ;")).loops
    assert loop.in_flight() == 1


def test_a_loop_is_found_wherever_its_blocks_lie():
    start, end = LISTING.index(".L_x_4:"), LISTING.index(".L_x_5:")
    block = LISTING[start:end]
    away = LISTING[:start] + LISTING[end:] + block + "        /*0500*/   BRA `(.L_x_5) ;\n"
    assert away.index(".L_x_5:") < away.index(".L_x_4:")
    (loop,), (before,) = only(away).loops, only().loops
    assert set(before.way) < set(loop.way) and len(loop.way) == len(before.way) + 1


def test_lanes_that_have_not_come_and_calls_that_are_jumps():
    """BRA.DIV is not taken; a call of a label that is no function's leaves."""
    start = LISTING.index("        /*0280*/")
    jump = "        /*0278*/   CALL.REL.NOINC `(.L_x_4) ;\n"
    assert only(LISTING[:start] + jump + LISTING[start:]).loops[0].vectors("global", False) == 1
    apart = LISTING.replace("@P0 BRA `(.L_x_4)", "BRA.DIV ~URZ, `(.L_x_4)")
    assert only(apart).loops[0].vectors("global", False) == 0


@pytest.mark.parametrize(
    ("opcode", "access"),
    [
        ("LDG.E.U8", Access("global", True, 1)),
        ("LDG.E.NA.128.CONSTANT", Access("global", True, 16)),
        ("LD.E.64", Access("global", True, 8)),
        ("STG.E.EF.U16", Access("global", False, 2)),
        ("LDS", Access("shared", True, 4)),
        ("LDS.S8", Access("shared", True, 1)),
        ("STL.64", Access("local", False, 8)),
        ("LDGSTS.E.BYPASS.128", Access("copy", True, 16)),
        ("LDC.U8", None),
        ("ULDC.64", None),
        ("FADD", None),
    ],
)
def test_an_access_is_read_off_its_instruction(opcode, access):
    assert access_of(opcode) == access


# The rules

HOT_LOOP = HotLoop("y", (2, 0, 1), loops=1, narrow=0, in_flight=2, limit=(0, 18, 0))


def faults(monkeypatch, listing, hot=HOT_LOOP):
    monkeypatch.setitem(cuda_limits.HOT_LOOPS, "mini", (hot,))
    return list(cuda_limits.faults("mini<float, 4>", "sm_90", only(listing)))


def test_code_as_it_should_be_has_no_fault(monkeypatch):
    assert faults(monkeypatch, LISTING) == []


VECTOR_STORE = "STG.E.128 desc[UR6][R8.64], R4 ;"
FAULTS = {
    "a byte": ("LDS R14, [R12]", "LDS.U8 R14, [R12]", "accesses of 4 bytes and more, got 1 of 1"),
    "half a number": ("LDS R14, [R12]", "LDS.U16 R14, [R12]", "4 bytes and more, got 1 of 2"),
    "local memory": ("FADD R5, R5, R9", "STL [R1], R9", "no local memory, got 1 accesses"),
    "a narrow store": (
        VECTOR_STORE,
        VECTOR_STORE.replace(".128", ""),
        "got one over 2+0+0 vectors",
    ),
    "one store less": (
        VECTOR_STORE,
        "NOP ;",
        "loops over 2+0+1 vectors (from global, from shared, stored): expected 1, got 0",
    ),
    "a narrow load": (
        "FADD R5, R5, R9",
        "LDG.E R5, desc[UR6][R8.64]",
        "y: expected whole vectors on the way, got 1 of 4 bytes",
    ),
    "more of the small maps": (
        "FADD R5, R5, R9",
        "LDS R5, [R12]",
        "y: expected at most 0 numbers of 4 bytes a turn, got 1",
    ),
    "a load within": (
        "LDS R14, [R12]",
        "LDG.E R14, [R12.64]",
        "y: expected loads of whole vectors, got 1 of 4 bytes",
    ),
    "elements that no edge has": (
        "VOTE.ANY R8, PT, PT ;",
        "STG.E [R8.64], R4 ;\n        /*0281*/   STG.E [R8.64], R5 ;",
        "y: expected at most 5 narrow stores, of edges' elements and sums, got 6",
    ),
    "one at a time": ("IMAD.WIDE R8, R2,", "IMAD.WIDE R8, R6,", "2 vectors in flight, got 1"),
    "a copy that is none": (
        VECTOR_STORE,
        "STS.128 [R8], R4 ;",
        "loops over 2+0+1 vectors (from global, from shared, stored): expected 1, got 0",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_named(monkeypatch, fault):
    good, bad, told = FAULTS[fault]
    assert LISTING.count(good) == 1
    got = faults(monkeypatch, LISTING.replace(good, bad))
    assert any(told in line for line in got), got


def test_a_loop_that_stores_vectors_is_no_stencils(monkeypatch):
    """However many numbers it reads in shared memory."""
    monkeypatch.setattr(cuda_limits, "TAPS", 0)
    assert faults(monkeypatch, LISTING) == []


def test_more_instructions_than_the_limit_are_a_fault(monkeypatch):
    less = dataclasses.replace(HOT_LOOP, limit=(0, 17, 0))
    assert faults(monkeypatch, LISTING, less) == [
        "y: expected at most 17 instructions a vector, got 18.0"
    ]


def test_a_kernel_without_limits_is_a_fault():
    (told,) = cuda_limits.faults("novel<float>", "sm_90", only())
    assert "got one without limits" in told


def test_a_small_kernel_has_a_limit_on_all_its_instructions(monkeypatch):
    monkeypatch.setitem(cuda_limits.WHOLE, "maps", 61)
    assert not list(cuda_limits.faults("maps<float>", "sm_80", only()))
    monkeypatch.setitem(cuda_limits.WHOLE, "maps", 60)
    (told,) = cuda_limits.faults("maps<float>", "sm_80", only())
    assert told == "expected at most 60 instructions, got 61"


@pytest.mark.parametrize("past_l1", [True, False])
def test_what_blocks_tell_each_other_is_no_full_size_tensor(monkeypatch, past_l1):
    """A loop like no other of the kernel's, but for loads past L1 instead of stores."""
    monkeypatch.setitem(cuda_limits.HOT_LOOPS, "mini", ())
    code = LISTING.replace("STG.E", "FADD")
    if past_l1:
        code = code.replace("LDG.E.128", "LDG.E.128.STRONG.GPU")
    got = list(cuda_limits.faults("mini<float, 4>", "sm_90", only(code)))
    assert bool(got) != past_l1


WAIT = "        /*%04x*/   ACQBULK ;\n"


@pytest.mark.parametrize(
    ("before", "vectors", "told"),
    [
        (0x0070, True, []),  # before anything
        (0x0200, True, []),  # after loads of vectors, and of shared memory
        (0x02E0, False, ["expected no more than loads of x and dy before ACQBULK, got STG.E"]),
        (None, True, ["expected a wait for the launch before (ACQBULK), got none"]),
    ],
)
def test_an_early_launch_waits_before_it_touches_what_others_wrote(before, vectors, told):
    code = LISTING
    if before is not None:
        at = LISTING.index(f"        /*{before:04x}*/")
        code = LISTING[:at] + WAIT % (before - 8) + LISTING[at:]
    assert list(cuda_limits.early_faults(only(code).instructions, vectors)) == told
    narrow = code.replace("LDG.E.128 R4", "LDG.E R4")
    if not told and before > 0xB0:
        assert list(cuda_limits.early_faults(only(narrow).instructions, True))
        assert not list(cuda_limits.early_faults(only(narrow).instructions, False))


def test_only_launches_that_may_be_early_have_to_wait():
    def waits(name, arch):
        return any("ACQBULK" in fault for fault in cuda_limits.faults(name, arch, only()))

    assert waits("maps<float, terms>", "sm_90") and waits("scale<float, 1, true, whole>", "sm_120")
    assert not waits("fold<float>", "sm_89") and not waits("chip_forward<float>", "sm_90")


def test_the_slots_are_those_of_the_gpus():
    """What the multiprocessors issue a second, over the pieces of 512 bytes that memory moves."""
    assert [round(slots) for slots in cuda_limits.SLOTS.values()] == [178, 124]
    assert cuda_limits.share(89, 1, "H100") == pytest.approx(0.5, abs=0.01)


def test_the_report_has_a_line_for_each_loop(monkeypatch):
    """36 instructions for two vectors loaded and one stored: 18 each, 12 for each of the three."""
    monkeypatch.setitem(cuda_limits.HOT_LOOPS, "mini", (HOT_LOOP,))
    kernel = cuda_report.Kernel("mini<float, 4>", "sm_90", only(), registers=16, local=0)
    head, line = cuda_report.hot_loops([kernel], ["sm_90"])
    assert head[1:] == ["vectors", "sm_90", "limit", "H100", "H200"]
    assert line == ["mini<float, 4> y", "2+0+1", "18/2", "18", "7%", "10%"]


@pytest.mark.parametrize(
    ("name", "kernel"),
    [
        ("sums<half, 8, forward, rows, whole>", ("sums, forward, rows, whole", 2, True)),
        ("sums<double, 2, backward, any, split>", ("sums, backward, any, split", 8, True)),
        ("sums<float, 1, through, any, whole>", ("sums, through, any, whole", 4, False)),
        ("scale<bfloat16, 8, true, split>", ("scale, backward, split", 2, True)),
        ("tail_sums<half, 8, moments, rows>", ("tail_sums, moments, rows", 2, True)),
        ("tail_scale<float, 1, true, cols>", ("tail_scale, backward, cols", 4, False)),
        ("tail_scale<double, 2, normed, rows>", ("tail_scale, normed, rows", 8, True)),
        ("chip_forward<half>", ("chip_forward", 2, True)),
        ("chip_backward<float>", ("chip_backward", 4, True)),
        ("maps<double, terms>", ("maps", 8, False)),
    ],
)
def test_a_name_says_which_rules_hold(name, kernel):
    assert cuda_limits.kernel_of(name) == kernel
