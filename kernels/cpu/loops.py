"""The loops of the CPU path, compiled by Numba: one pass over all steps, what belongs to a line in L1.

Everything here works on lines: at most `LINE` elements of a step that lie side by side in memory. A line goes through
all its steps before the next one begins, so that a tensor is read once and written once. What differs by channel is
spread over a line first; after that a loop knows nothing of channels, images or memory orders.

Shapes: S elements of a step, C channels, G groups of a step: runs of `span` elements, each cut into pieces.

All tensors come as addresses, with a vector of their type, and options as numbers: there is one compilation a dtype.
Numba's cache of a function knows changes of this file alone, so that nothing compiled may come from another one.
"""

import numba
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

# Elements of a line of the loops over time, whose lines should all stay in L1, and of the others (measured).
LINE, WIDE = 128, 512
# How many groups are summed up in a line of the state's type before they are added in fp64.
FLUSH = 32

# Where the options of a neuron lie in their vector.
DECAY, KEEP, GAIN, REST, THRESHOLD, HARD, JUMP, FALL, DROP, ALPHA, WIDTH, SLOPE_OF_ATAN = range(12)
# Where the lines begin in the scratch memory, and where the wide ones do.
MEAN, SCALE, BIAS, V, GRAD_V, GRAD, TOTAL, PRODUCT = range(0, 8 * LINE, LINE)
FIRST, SECOND, THIRD, FOURTH = range(0, 4 * WIDE, WIDE)
# After them lie those of a segment's steps: h, the surrogate's slope, v.
LINES = 8


def compiled(function):
    """`function` compiled at its first call, and kept on disk where there is a place that can be written."""
    options = {"nogil": True, "error_model": "numpy", "_nrt": False, "no_cfunc_wrapper": True}
    try:
        return numba.njit(cache=True, **options)(function)
    except RuntimeError:
        return numba.njit(**options)(function)


def inlined(**options):
    """For what compiled functions call: always inlined, and Numba's wrappers for Python left out."""
    return numba.njit(
        error_model="numpy", _nrt=False, forceinline=True, no_cpython_wrapper=True, no_cfunc_wrapper=True, **options
    )


# Sums may be taken in any order, and a product and a sum rounded once; never before a threshold.
SUMS = {"reassoc", "contract"}


class Accesses:
    """Reading from arrays and writing to them in a loop.

    The compiler is told that what is `read` and the `state`, which is read and written at one place in each turn, lie
    apart from each other and from what is written elsewhere: it would look for overlaps before each line, or, with
    several steps in one loop, give up. Arrays of bf16 come as uint16, those of fp16 as int16, and are read and written
    as the state's type.

    Args:
        loop: the loop's name; nothing is said about two loops. None: the compiler is told nothing.
    """

    def __init__(self, loop: str | None = None):
        self.loop = loop
        self.read, self.write = reader(self, "read"), writer(self, "written")
        self.state, self.keep = reader(self, "state"), writer(self, "state")

    def mark(self, module, instruction, role: str):
        if self.loop is not None:
            domain = module.add_metadata([self.loop])
            scopes = {name: module.add_metadata([name, domain]) for name in ("read", "state", "written")}
            instruction.set_metadata("alias.scope", module.add_metadata([scopes.pop(role)]))
            instruction.set_metadata("noalias", module.add_metadata(list(scopes.values())))
        return instruction


def reader(accesses: Accesses, role: str):
    @intrinsic
    def read(typing, array, i):
        half = array.dtype in (types.uint16, types.int16)
        result = types.float32 if half else array.dtype

        def generate(context, builder, signature, arguments):
            data = context.make_array(signature.args[0])(context, builder, arguments[0]).data
            pointer = builder.gep(data, [arguments[1]])
            if array.dtype == types.int16:
                pointer = builder.bitcast(pointer, ir.HalfType().as_pointer())
            number = accesses.mark(builder.module, builder.load(pointer), role)
            if array.dtype == types.uint16:
                bits = builder.zext(number, ir.IntType(32))
                return builder.bitcast(builder.shl(bits, ir.Constant(bits.type, 16)), ir.FloatType())
            return builder.fpext(number, ir.FloatType()) if array.dtype == types.int16 else number

        return result(array, types.int64), generate

    return read


def writer(accesses: Accesses, role: str):
    @intrinsic
    def write(typing, array, i, value):
        def generate(context, builder, signature, arguments):
            data = context.make_array(signature.args[0])(context, builder, arguments[0]).data
            pointer, number = builder.gep(data, [arguments[1]]), arguments[2]
            if array.dtype == types.uint16:
                # To the nearest, ties to even, as torch rounds.
                word, half = ir.IntType(32), ir.IntType(16)
                bits = builder.bitcast(number, word)
                odd = builder.and_(builder.lshr(bits, ir.Constant(word, 16)), ir.Constant(word, 1))
                rounded = builder.add(bits, builder.add(odd, ir.Constant(word, 0x7FFF)))
                upper = builder.trunc(builder.lshr(rounded, ir.Constant(word, 16)), half)
                unordered = builder.fcmp_unordered("uno", number, number)
                number = builder.select(unordered, ir.Constant(half, 0x7FC0), upper)
            elif array.dtype == types.int16:
                number = builder.fptrunc(number, ir.HalfType())
                pointer = builder.bitcast(pointer, number.type.as_pointer())
            accesses.mark(builder.module, builder.store(number, pointer), role)
            return context.get_dummy_value()

        state = types.float32 if array.dtype in (types.uint16, types.int16) else array.dtype
        return types.void(array, types.int64, state), generate

    return write


plain = Accesses()
read, write = plain.read, plain.write


@intrinsic
def at(typing, like, address):
    """The memory at an address, as an array of the type of `like`: to unbox an address is fast."""

    def generate(context, builder, signature, arguments):
        array = context.make_array(like)(context, builder)
        array.data = builder.inttoptr(arguments[1], array.data.type)
        return array._getvalue()

    return like(like, types.int64), generate


@intrinsic
def beyond(typing, array, offset):
    """An array without its first `offset` elements."""

    def generate(context, builder, signature, arguments):
        whole = context.make_array(array)(context, builder, arguments[0])
        rest = context.make_array(array)(context, builder)
        rest.data = builder.gep(whole.data, [arguments[1]])
        return rest._getvalue()

    return array(array, types.int64), generate


@intrinsic
def power_of_two(typing, n):
    """2^n for a whole n of a floating-point type, within the exponents of its normal numbers."""
    bits, mantissa, bias = (32, 23, 127) if n == types.float32 else (64, 52, 1023)

    def generate(context, builder, signature, arguments):
        word = ir.IntType(bits)
        exponent = builder.add(builder.fptosi(arguments[0], word), ir.Constant(word, bias))
        return builder.bitcast(builder.shl(exponent, ir.Constant(word, mantissa)), arguments[0].type)

    return n(n), generate


@intrinsic
def whole(typing, x):
    """x without what comes after the point, for |x| < 2^31."""

    def generate(context, builder, signature, arguments):
        return builder.sitofp(builder.fptosi(arguments[0], ir.IntType(32)), arguments[0].type)

    return x(x), generate


@inlined()
def bounds(line, size, width, span, run):
    """(where a line starts, how many elements it has, where the channels of its elements are told from, whether the
    next line has others).
    """
    pieces = -(-span // width)
    group, piece = line // pieces, line % pieces
    start = group * span + piece * width
    n = min(width, (group + 1) * span - start, size - start)
    if span == run:
        return start, n, group * span, piece + 1 == pieces
    return start, n, piece * width, pieces > 1


@inlined()
def spread(values, row, scratch, to, phase, width, run, channels):
    """Row `row` of values [_, C] over a line that starts at element `phase` of its group."""
    channel, left, i = phase // run % channels, run - phase % run, 0
    while i < width:
        value, stop = read(values, row * channels + channel), min(i + left, width)
        for j in range(i, stop):
            write(scratch, to + j, value)
        i, left = stop, run
        channel = channel + 1 if channel + 1 < channels else 0


@inlined(fastmath=SUMS)
def flush(sums, row, scratch, line, phase, n, run, channels):
    """Add a line to the sums of its channels, row `row` of sums [_, C]."""
    channel, left, i, zero = phase // run % channels, run - phase % run, 0, scratch.dtype.type(0)
    if run == 1:
        while i < n:
            stop = min(n - i, channels - channel)
            for j in range(stop):
                sums[row * channels + channel + j] += read(scratch, line + i + j)
            i, channel = i + stop, 0
    else:
        while i < n:
            total, stop = zero, min(i + left, n)
            for j in range(i, stop):
                total += read(scratch, line + j)
            sums[row * channels + channel] += total
            i, left = stop, run
            channel = channel + 1 if channel + 1 < channels else 0


@inlined()
def copy(source, at, target, to, n):
    for i in range(n):
        write(target, to + i, read(source, at + i))


@inlined()
def clear(scratch, line, n, zero):
    for i in range(n):
        write(scratch, line + i, zero)


@inlined()
def charge(v, x, decay, rest, gain):
    return v - (v - rest) * decay + gain * x


@inlined()
def fire(h, threshold, zero, one):
    """1 where h reaches the threshold, NaN where h is NaN."""
    s = one if h >= threshold else zero
    return s if h == h else h


@inlined()
def reset(h, s, hard, jump, one):
    """(1 - s) h + s v_reset, or for a soft reset (hard = 0, jump = -threshold) h - s threshold."""
    return (one - s * hard) * h + s * jump


def stepper(count: int):
    """A function for `count` steps in one loop, the state in a register from one to the next."""
    a = Accesses("step")
    read, write, state, keep = a.read, a.write, a.state, a.keep

    @inlined()
    def step(scratch, y, y_at, y_step, residual, residual_at, residual_step, target, at, target_step, spiking, o, n):
        """A line some steps on: its spikes, or h for the backward pass, to `target`. Both passes call this."""
        decay, rest, gain, threshold = o[DECAY], o[REST], o[GAIN], o[THRESHOLD]
        hard, jump, zero, one = o[HARD], o[JUMP], o.dtype.type(0), o.dtype.type(1)
        for i in range(n):
            mean, scale, bias = read(scratch, MEAN + i), read(scratch, SCALE + i), read(scratch, BIAS + i)
            v = state(scratch, V + i)
            for k in range(count):
                # Batch norm and residual, in the definition's sums and products.
                x = (read(y, y_at + k * y_step + i) - mean) * scale + bias
                x += read(residual, residual_at + k * residual_step + i)
                h = charge(v, x, decay, rest, gain)
                s = fire(h, threshold, zero, one)
                v = reset(h, s, hard, jump, one)
                write(target, at + k * target_step + i, s if spiking else h)
            keep(scratch, V + i, v)

    return step


# Steps that share a loop: with more, registers would spill.
MANY = 4
step, steps_at_once = stepper(1), stepper(MANY)


@inlined()
def advance(
    scratch, y, y_at, y_step, residual, residual_at, residual_step, target, at, target_step, spiking, o, count, n
):
    """A line `count` steps on."""
    i = 0
    while i < count:
        if count - i >= MANY:
            steps_at_once(
                scratch,
                y,
                y_at + i * y_step,
                y_step,
                residual,
                residual_at + i * residual_step,
                residual_step,
                target,
                at + i * target_step,
                target_step,
                spiking,
                o,
                n,
            )
            i += MANY
        else:
            step(
                scratch,
                y,
                y_at + i * y_step,
                y_step,
                residual,
                residual_at + i * residual_step,
                residual_step,
                target,
                at + i * target_step,
                target_step,
                spiking,
                o,
                n,
            )
            i += 1


@compiled
def forward(first, last, numbers, o, parameters, like, scratch):
    """Spikes, the last state where `ends`, and the states at the start of every segment but the first."""
    (
        parts, size, groups, width, span, run, channels, steps, segment, y_at, y_step, residual_at, residual_step,
        residual_line, v0_at, v0_line, spikes_at, v_last_at, ends, saved_at,
    ) = numbers  # fmt: skip
    y, residual, spikes = at(like, y_at), at(like, residual_at), at(like, spikes_at)
    v0, v_last, saved = at(scratch, v0_at), at(scratch, v_last_at), at(scratch, saved_at)
    lines, before = groups * -(-span // width), -1
    for line in range(lines * first // parts, lines * last // parts):
        start, n, phase, _ = bounds(line, size, width, span, run)
        if phase != before:
            before = phase
            for row in range(3):
                spread(parameters, row, scratch, row * LINE, phase, width, run, channels)
        copy(v0, start * v0_line, scratch, V, n)
        for t in range(0, steps, segment):
            if t:
                copy(scratch, V, saved, (t // segment - 1) * size + start, n)
            advance(
                scratch,
                y,
                t * y_step + start,
                y_step,
                residual,
                t * residual_step + start * residual_line,
                residual_step,
                spikes,
                t * size + start,
                size,
                True,
                o,
                min(segment, steps - t),
                n,
            )
        if ends:
            copy(scratch, V, v_last, start, n)


@inlined(fastmath={"contract"})
def slopes(hs, ws, surrogate, o, n):
    """The surrogate's derivative at u = h - threshold for n elements of hs, to ws."""
    number = o.dtype.type
    threshold, alpha, width, factor = o[THRESHOLD], o[ALPHA], o[WIDTH], o[SLOPE_OF_ATAN]
    zero, half, one = number(0), number(0.5), number(1)
    if surrogate == 0:
        for i in range(n):
            u = factor * (read(hs, i) - threshold)
            write(ws, i, half * alpha / (one + u * u))
    elif surrogate == 1:
        # exp by its series, since a loop with a call would not vectorise; beyond `far` nothing is left of it.
        log2e, ln2, far = number(1.4426950408889634), number(0.6931471805599453), number(80)
        for i in range(n):
            u = read(hs, i) - threshold
            x = -alpha * abs(u)
            x = x if x > -far else -far
            exponent = whole(x * log2e - half)
            rest, e = x - exponent * ln2, one
            for k in range(13, 0, -1):
                e = one + rest * number(1 / k) * e
            e *= power_of_two(exponent)
            w = alpha * e / ((one + e) * (one + e))
            write(ws, i, w if u == u else u)
    elif surrogate == 2:
        for i in range(n):
            w = one - alpha * abs(read(hs, i) - threshold)
            write(ws, i, zero if w < zero else alpha * w)
    elif surrogate == 3:
        for i in range(n):
            write(ws, i, alpha if abs(read(hs, i) - threshold) < width else zero)
    else:
        for i in range(n):
            root = one + alpha * abs(read(hs, i) - threshold)
            write(ws, i, one / (root * root))


def back_stepper(count: int):
    """A function for `count` steps back in one loop, the gradient of the state in a register."""
    a = Accesses("step back")
    read, write, state, keep = a.read, a.write, a.state, a.keep

    @inlined(fastmath={"contract"})
    def step_back(scratch, hs, ws, at, y, y_at, y_step, grad, grad_at, grad_step, g, g_at, g_step, o, n):
        """A line some steps back: line GRAD_V from dL/dv of the last step to that before the first, dL/dx to g, and
        dL/dx and dL/dx (y - mean) added to their sums.
        """
        threshold, decay_kept, gain, zero, one = o[THRESHOLD], o[KEEP], o[GAIN], o.dtype.type(0), o.dtype.type(1)
        hard, falls, drop = o[HARD] != zero, o[FALL] != zero, o[DROP]
        for i in range(n):
            mean, v = read(scratch, MEAN + i), state(scratch, GRAD_V + i)
            total, product, dx = state(scratch, TOTAL + i), state(scratch, PRODUCT + i), zero
            for back in range(count):
                k = count - 1 - back
                h = read(hs, at + k * LINE + i)
                s = fire(h, threshold, zero, one)
                # Chosen, not multiplied by 0, which would make a NaN of what is infinite.
                dv_ds = drop - (h if falls else zero)
                dv_dh = one - (s if hard else zero)
                dh = (read(grad, grad_at + k * grad_step + i) + v * dv_ds) * read(ws, at + k * LINE + i) + v * dv_dh
                v, dx = dh * decay_kept, dh * gain
                write(g, g_at + k * g_step + i, dx)
                total += dx
                product += dx * (read(y, y_at + k * y_step + i) - mean)
            keep(scratch, GRAD_V + i, v)
            keep(scratch, TOTAL + i, total)
            keep(scratch, PRODUCT + i, product)
            if count == 1:
                keep(scratch, GRAD + i, dx)

    return step_back


step_back, steps_back_at_once = back_stepper(1), back_stepper(MANY)


@inlined(fastmath=SUMS)
def decay_share(scratch, vs, at, y, y_at, residual, residual_at, o, decays, n):
    """What a line adds to dL/d(1/tau) in one step: the sum of dL/dh (rest - v, and + x if the input decays)."""
    total, rest = 0.0, o[REST]
    if decays:
        for i in range(n):
            x = (read(y, y_at + i) - read(scratch, MEAN + i)) * read(scratch, SCALE + i) + read(scratch, BIAS + i)
            x += read(residual, residual_at + i)
            total += read(scratch, GRAD + i) * (rest - read(vs, at + i) + x)
    else:
        for i in range(n):
            total += read(scratch, GRAD + i) * (rest - read(vs, at + i))
    return total / o[GAIN]


@compiled
def backward(first, last, numbers, o, parameters, sums, grad_decay, like, scratch):
    """dL/dx of every step to g, or where `constant` summed over time to `total`; dL/dv0 where v0 `begins`; by part the
    sums of dL/dx and of dL/dx (y - mean) over a channel where `summed`, and dL/d(1/tau) where it is `learnt`.
    """
    (
        parts, size, groups, width, span, run, channels, steps, segment, y_at, y_step, residual_at, residual_step,
        residual_line, v0_at, v0_line, saved_at, grad_at, grad_step, grad_line, grad_end_at, grad_end_line,
        g_at, g_step, g_line, total_at, total_line, constant, grad_v0_at, begins, summed, learnt, decays, surrogate,
    ) = numbers  # fmt: skip
    y, residual, grad, g, total = (
        at(like, y_at), at(like, residual_at), at(like, grad_at), at(like, g_at), at(like, total_at)
    )  # fmt: skip
    v0, saved, grad_end, grad_v0 = (
        at(scratch, v0_at),
        at(scratch, saved_at),
        at(scratch, grad_end_at),
        at(scratch, grad_v0_at),
    )
    hs = beyond(scratch, LINES * LINE)
    ws = beyond(hs, segment * LINE)
    vs = beyond(ws, segment * LINE)
    lines, before, zero = groups * -(-span // width), -1, o.dtype.type(0)
    for part in range(first, last):
        final, full = lines * (part + 1) // parts, 0
        for line in range(lines * part // parts, final):
            start, n, phase, ends = bounds(line, size, width, span, run)
            if phase != before:
                before = phase
                for row in range(3):
                    spread(parameters, row, scratch, row * LINE, phase, width, run, channels)
            if full == 0:
                clear(scratch, TOTAL, width, zero)
                clear(scratch, PRODUCT, width, zero)
            copy(grad_end, start * grad_end_line, scratch, GRAD_V, n)
            for begin in range((steps - 1) // segment * segment, -1, -segment):
                if begin:
                    copy(saved, (begin // segment - 1) * size + start, scratch, V, n)
                else:
                    copy(v0, start * v0_line, scratch, V, n)
                count = min(segment, steps - begin)
                for i in range(count * learnt):
                    t = begin + i
                    copy(scratch, V, vs, i * LINE, n)
                    advance(
                        scratch,
                        y,
                        t * y_step + start,
                        y_step,
                        residual,
                        t * residual_step + start * residual_line,
                        residual_step,
                        hs,
                        i * LINE,
                        LINE,
                        False,
                        o,
                        1,
                        n,
                    )
                if not learnt:
                    advance(
                        scratch,
                        y,
                        begin * y_step + start,
                        y_step,
                        residual,
                        begin * residual_step + start * residual_line,
                        residual_step,
                        hs,
                        0,
                        LINE,
                        False,
                        o,
                        count,
                        n,
                    )
                slopes(hs, ws, surrogate, o, (count - 1) * LINE + n)
                i = count
                while i > 0:
                    if i >= MANY and not learnt:
                        i -= MANY
                        t = begin + i
                        steps_back_at_once(
                            scratch,
                            hs,
                            ws,
                            i * LINE,
                            y,
                            t * y_step + start,
                            y_step,
                            grad,
                            t * grad_step + start * grad_line,
                            grad_step,
                            g,
                            t * g_step + start * g_line,
                            g_step,
                            o,
                            n,
                        )
                    else:
                        i -= 1
                        t = begin + i
                        step_back(
                            scratch,
                            hs,
                            ws,
                            i * LINE,
                            y,
                            t * y_step + start,
                            y_step,
                            grad,
                            t * grad_step + start * grad_line,
                            grad_step,
                            g,
                            t * g_step + start * g_line,
                            g_step,
                            o,
                            n,
                        )
                    if learnt:
                        grad_decay[part] += decay_share(
                            scratch,
                            vs,
                            i * LINE,
                            y,
                            t * y_step + start,
                            residual,
                            t * residual_step + start * residual_line,
                            o,
                            decays,
                            n,
                        )
            if begins:
                copy(scratch, GRAD_V, grad_v0, start, n)
            if constant:
                copy(scratch, TOTAL, total, start * total_line, n)
            full += 1
            if full == FLUSH or constant or line + 1 == final or ends:
                if summed:
                    wide = min(width, span - phase % span)
                    flush(sums, 2 * part, scratch, TOTAL, phase, wide, run, channels)
                    flush(sums, 2 * part + 1, scratch, PRODUCT, phase, wide, run, channels)
                full = 0


@inlined(fastmath=SUMS)
def deviations(scratch, y, at, n):
    """Sums of y - mean and of its square, element by element of a line."""
    for i in range(n):
        d = read(y, at + i) - read(scratch, FIRST + i)
        write(scratch, SECOND + i, read(scratch, SECOND + i) + d)
        write(scratch, THIRD + i, read(scratch, THIRD + i) + d * d)


@inlined(fastmath=SUMS)
def add_run(sums, row, channels, channel, y, at, n, pivot):
    """The same of a run of one channel, in registers."""
    centre, total, square = pivot[channel], pivot.dtype.type(0), pivot.dtype.type(0)
    for i in range(n):
        d = read(y, at + i) - centre
        total += d
        square += d * d
    sums[row * channels + channel] += total
    sums[(row + 1) * channels + channel] += square


@compiled
def moments(first, last, numbers, pivot, sums, like, scratch):
    """By part and channel, the sums of y - pivot and of its square."""
    parts, size, groups, width, span, run, channels, y_at = numbers
    y = at(like, y_at)
    lines, before, zero = groups * -(-span // width), -1, pivot.dtype.type(0)
    for part in range(first, last):
        final, full = lines * (part + 1) // parts, 0
        for line in range(lines * part // parts, final):
            start, n, phase, ends = bounds(line, size, width, span, run)
            if span == run:
                add_run(sums, 2 * part, channels, start // run % channels, y, start, n, pivot)
                continue
            if phase != before:
                before = phase
                spread(pivot, 0, scratch, FIRST, phase, width, run, channels)
            if full == 0:
                clear(scratch, SECOND, width, zero)
                clear(scratch, THIRD, width, zero)
            deviations(scratch, y, start, n)
            full += 1
            if full == FLUSH or line + 1 == final or ends:
                wide = min(width, span - phase % span)
                flush(sums, 2 * part, scratch, SECOND, phase, wide, run, channels)
                flush(sums, 2 * part + 1, scratch, THIRD, phase, wide, run, channels)
                full = 0


@inlined(fastmath={"contract"})
def normalise_back(scratch, y, through, out, at, n):
    if through:
        for i in range(n):
            mean_g = read(y, at + i) * read(scratch, FIRST + i) + read(scratch, THIRD + i)
            write(out, at + i, (read(scratch, FOURTH + i) - mean_g) * read(scratch, SECOND + i))
    else:
        for i in range(n):
            write(out, at + i, read(scratch, FOURTH + i) * read(scratch, SECOND + i))


@compiled
def norm_backward(first, last, numbers, parameters, like, scratch):
    """scale (g - slope y - offset), the second and third only where `through`; grad_y may be g.

    `parameters` has the rows slope, scale and offset.
    """
    parts, size, groups, width, span, run, channels, g_at, y_at, through, grad_y_at = numbers
    g, y, grad_y = at(like, g_at), at(like, y_at), at(like, grad_y_at)
    lines, before = groups * -(-span // width), -1
    for line in range(lines * first // parts, lines * last // parts):
        start, n, phase, _ = bounds(line, size, width, span, run)
        if phase != before:
            before = phase
            for row in range(3):
                spread(parameters, row, scratch, row * WIDE, phase, width, run, channels)
        copy(g, start, scratch, FOURTH, n)
        normalise_back(scratch, y, through, grad_y, start, n)


@inlined()
def add_energy(scratch, to, source, at, power, n):
    """|source|^power, added to a line."""
    number = scratch.dtype.type
    if power == 1:
        for i in range(n):
            write(scratch, to + i, read(scratch, to + i) + abs(read(source, at + i)))
    elif power == 2:
        for i in range(n):
            x = read(source, at + i)
            write(scratch, to + i, read(scratch, to + i) + x * x)
    else:
        for i in range(n):
            write(scratch, to + i, read(scratch, to + i) + abs(read(source, at + i)) ** number(power))


@inlined()
def energy_slope(scratch, to, source, at, power, n):
    """The derivative of |source|^power, +1 at 0 for power 1, times line GRAD, to a line."""
    number = scratch.dtype.type
    factor, exponent, zero = number(power), number(power - 1), number(0)
    if power == 1:
        for i in range(n):
            g = read(scratch, GRAD + i)
            write(scratch, to + i, -g if read(source, at + i) < zero else g)
    elif power == 2:
        for i in range(n):
            write(scratch, to + i, factor * read(source, at + i) * read(scratch, GRAD + i))
    else:
        for i in range(n):
            x = read(source, at + i)
            slope = factor * abs(x) ** exponent * read(scratch, GRAD + i)
            write(scratch, to + i, -slope if x < zero else slope)


@inlined()
def add_steps(scratch, to, x, at, x_step, steps, n):
    """The mean over time of x, to a line."""
    number = scratch.dtype.type
    clear(scratch, to, n, number(0))
    for t in range(steps):
        for i in range(n):
            write(scratch, to + i, read(scratch, to + i) + read(x, t * x_step + at + i))
    divide(scratch, to, number(steps), n)


@inlined()
def divide(scratch, line, divisor, n):
    for i in range(n):
        write(scratch, line + i, read(scratch, line + i) / divisor)


@inlined(fastmath=SUMS)
def fold(scratch, line, f, start, n, run, channels):
    """Add a line, element `start` of a step on, to the sums over channels f [images, run]."""
    pixel, channel, image, i = start % run, start // run % channels, start // (run * channels), 0
    while i < n:
        if run == 1:
            stop, total = min(n, i + channels - channel), scratch.dtype.type(0)
            for j in range(i, stop):
                total += read(scratch, line + j)
            write(f, image, read(f, image) + total)
            channel = channels
        else:
            stop, at = min(n, i + run - pixel), image * run + pixel - i
            for j in range(i, stop):
                write(f, at + j, read(f, at + j) + read(scratch, line + j))
            channel += 1
        i, pixel = stop, 0
        if channel == channels:
            image, channel = image + 1, 0


@inlined()
def unfold(f, scratch, line, start, n, run, channels, divisor):
    """f [images, run] / divisor, repeated over the channels, to a line."""
    pixel, channel, image, i = start % run, start // run % channels, start // (run * channels), 0
    while i < n:
        if run == 1:
            stop, value = min(n, i + channels - channel), read(f, image) / divisor
            for j in range(i, stop):
                write(scratch, line + j, value)
            channel = channels
        else:
            stop, at = min(n, i + run - pixel), image * run + pixel - i
            for j in range(i, stop):
                write(scratch, line + j, read(f, at + j) / divisor)
            channel += 1
        i, pixel = stop, 0
        if channel == channels:
            image, channel = image + 1, 0


@compiled
def energy(first, last, numbers, power, like, scratch):
    """Add to f, over channels, |mean over time of x|^power where `of_mean`, else the mean over time of |x|^power."""
    parts, size, groups, width, span, run, channels, steps, x_at, x_step, of_mean, f_at = numbers
    x, f = at(like, x_at), at(scratch, f_at)
    pieces, number = -(-span // width), scratch.dtype.type
    # Whole images, so that no two parts add to the same pixel.
    together = channels if span == run and channels > 1 else 1
    images, pieces = groups // together, pieces * together
    for line in range(images * first // parts * pieces, images * last // parts * pieces):
        start, n, _, _ = bounds(line, size, width, span, run)
        clear(scratch, TOTAL, n, number(0))
        if of_mean:
            add_steps(scratch, V, x, start, x_step, steps, n)
            add_energy(scratch, TOTAL, scratch, V, power, n)
        else:
            for t in range(steps):
                add_energy(scratch, TOTAL, x, t * x_step + start, power, n)
            divide(scratch, TOTAL, number(steps), n)
        fold(scratch, TOTAL, f, start, n, run, channels)


@compiled
def energy_backward(first, last, numbers, power, like, scratch):
    """The gradient of x, for one step where `of_mean`."""
    parts, size, groups, width, span, run, channels, steps, x_at, x_step, of_mean, grad_at, grad_x_at = numbers
    x, grad, grad_x = at(like, x_at), at(scratch, grad_at), at(like, grad_x_at)
    lines, number = groups * -(-span // width), scratch.dtype.type
    for line in range(lines * first // parts, lines * last // parts):
        start, n, _, _ = bounds(line, size, width, span, run)
        unfold(grad, scratch, GRAD, start, n, run, channels, number(steps))
        if of_mean:
            add_steps(scratch, V, x, start, x_step, steps, n)
            energy_slope(scratch, TOTAL, scratch, V, power, n)
            copy(scratch, TOTAL, grad_x, start, n)
        else:
            for t in range(steps):
                energy_slope(scratch, TOTAL, x, t * x_step + start, power, n)
                copy(scratch, TOTAL, grad_x, t * size + start, n)


halving = Accesses("halving")
read_pixel, write_pixel = halving.read, halving.write


@compiled
def halve(first, last, numbers, like, scratch):
    """The mean of each 2 x 2 pixels of some of the planes [height, width]; an odd last row or column is left out."""
    height, width, x_at, out_at = numbers
    x, out, quarter = at(like, x_at), at(like, out_at), scratch.dtype.type(0.25)
    rows, columns = height // 2, width // 2
    for plane in range(first, last):
        for row in range(rows):
            upper, to = (plane * height + 2 * row) * width, (plane * rows + row) * columns
            lower = upper + width
            for i in range(columns):
                # In the order in which PyTorch adds them.
                total = read_pixel(x, upper + 2 * i) + read_pixel(x, upper + 2 * i + 1)
                total = total + read_pixel(x, lower + 2 * i)
                write_pixel(out, to + i, (total + read_pixel(x, lower + 2 * i + 1)) * quarter)


@compiled
def halve_backward(first, last, numbers, like, scratch):
    """The gradient of x; 0 in an odd last row or column."""
    height, width, grad_at, grad_x_at = numbers
    grad, grad_x = at(like, grad_at), at(like, grad_x_at)
    quarter, zero = scratch.dtype.type(0.25), scratch.dtype.type(0)
    rows, columns = height // 2, width // 2
    for plane in range(first, last):
        for row in range(rows):
            start, to = (plane * rows + row) * columns, (plane * height + 2 * row) * width
            for line in (to, to + width):
                for i in range(columns):
                    share = read_pixel(grad, start + i) * quarter
                    write_pixel(grad_x, line + 2 * i, share)
                    write_pixel(grad_x, line + 2 * i + 1, share)
                if width % 2:
                    write_pixel(grad_x, line + width - 1, zero)
        if height % 2:
            for i in range(width):
                write_pixel(grad_x, (plane * height + height - 1) * width + i, zero)
