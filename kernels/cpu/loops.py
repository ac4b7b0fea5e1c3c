"""The loops of the CPU path, compiled by Numba: one pass over all time steps, with the state in a line that stays in L1.

Everything here works on lines: at most `LINE` elements of a step that lie side by side in memory. A line goes through
all its steps before the next one begins, so that a tensor is read once and written once. What differs by channel is
spread over a line first; after that a loop knows nothing of channels, images or memory orders.

Shapes: S elements of a step, C channels, G groups of a step: runs of `span` elements, each cut into pieces.

All tensors come as flat vectors. Options come as numbers, not as types: there is one compilation for each dtype.
Numba's cache of a function knows changes of this file alone, so that nothing compiled may be imported from another one.
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
MEAN, SCALE, BIAS, V, SLOPE, GRAD_V, GRAD, TOTAL, PRODUCT = range(0, 9 * LINE, LINE)
FIRST, SECOND, THIRD, FOURTH = range(0, 4 * WIDE, WIDE)
SCRATCH = 4 * WIDE


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


@intrinsic
def read(typing, array, i):
    """array[i] in the state's type; bf16 comes as uint16, fp16 as int16."""
    half = array.dtype in (types.uint16, types.int16)
    result = types.float32 if half else array.dtype

    def generate(context, builder, signature, arguments):
        data = context.make_array(signature.args[0])(context, builder, arguments[0]).data
        pointer = builder.gep(data, [arguments[1]])
        if array.dtype == types.uint16:
            bits = builder.zext(builder.load(pointer), ir.IntType(32))
            return builder.bitcast(builder.shl(bits, ir.Constant(bits.type, 16)), ir.FloatType())
        if array.dtype == types.int16:
            number = builder.load(builder.bitcast(pointer, ir.HalfType().as_pointer()))
            return builder.fpext(number, ir.FloatType())
        return builder.load(pointer)

    return result(array, types.int64), generate


@intrinsic
def write(typing, array, i, value):
    """array[i] = value, rounded to the nearest half as torch rounds, where `array` is of one."""

    def generate(context, builder, signature, arguments):
        data = context.make_array(signature.args[0])(context, builder, arguments[0]).data
        pointer, number = builder.gep(data, [arguments[1]]), arguments[2]
        if array.dtype == types.uint16:
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
        builder.store(number, pointer)
        return context.get_dummy_value()

    state = types.float32 if array.dtype in (types.uint16, types.int16) else array.dtype
    return types.void(array, types.int64, state), generate


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
def bounds(line, size, width, span):
    """(which piece of its group a line is, where it starts, how many elements it has)."""
    pieces = -(-span // width)
    group, piece = line // pieces, line % pieces
    start = group * span + piece * width
    return piece, start, min(width, (group + 1) * span - start, size - start)


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
def current(scratch, y, y_at, residual, residual_at, i):
    """What a neuron receives: batch norm and residual, in the definition's sums and products."""
    x = (read(y, y_at + i) - read(scratch, MEAN + i)) * read(scratch, SCALE + i) + read(scratch, BIAS + i)
    return x + read(residual, residual_at + i)


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


@inlined()
def step(scratch, y, y_at, residual, residual_at, target, at, spiking, o, n):
    """A line one step on: its spikes, or h for the backward pass, to `target`. Both passes call this."""
    decay, rest, gain, threshold = o[DECAY], o[REST], o[GAIN], o[THRESHOLD]
    hard, jump, zero, one = o[HARD], o[JUMP], o.dtype.type(0), o.dtype.type(1)
    for i in range(n):
        x = current(scratch, y, y_at, residual, residual_at, i)
        h = charge(read(scratch, V + i), x, decay, rest, gain)
        s = fire(h, threshold, zero, one)
        write(scratch, V + i, reset(h, s, hard, jump, one))
        write(target, at + i, s if spiking else h)


@compiled
def forward(
    first,
    last,
    parts,
    geometry,
    steps,
    segment,
    o,
    parameters,
    y,
    y_step,
    residual,
    residual_step,
    residual_line,
    v0,
    v0_line,
    spikes,
    v_last,
    ends,
    saved,
    scratch,
):
    """Spikes, the last state where `ends`, and the states at the start of every segment but the first."""
    size, groups, width, span, run, channels = geometry
    lines, before = groups * -(-span // width), -1
    for line in range(lines * first // parts, lines * last // parts):
        piece, start, n = bounds(line, size, width, span)
        if piece != before:
            before = piece
            for row in range(3):
                spread(parameters, row, scratch, row * LINE, piece * width, width, run, channels)
        copy(v0, start * v0_line, scratch, V, n)
        for t in range(steps):
            if t and t % segment == 0:
                copy(scratch, V, saved, (t // segment - 1) * size + start, n)
            step(
                scratch,
                y,
                t * y_step + start,
                residual,
                t * residual_step + start * residual_line,
                spikes,
                t * size + start,
                True,
                o,
                n,
            )
        if ends:
            copy(scratch, V, v_last, start, n)


@inlined(fastmath={"contract"})
def sigmoids(scratch, hs, at, threshold, alpha, zero, one, n):
    """alpha e / (1 + e)^2 with e = exp(-alpha |u|) by its series, since a loop with a call would not vectorise."""
    log2e, ln2, far, half = alpha.type(1)
    for i in range(n):
        u = read(hs, at + i) - threshold


@inlined(fastmath={"contract"})
def slopes(scratch, hs, at, surrogate, o, n):
    """The surrogate's derivative at u = h - threshold, to line SLOPE."""
    number = o.dtype.type
    threshold, alpha, width, factor = o[THRESHOLD], o[ALPHA], o[WIDTH], o[SLOPE_OF_ATAN]
    zero, half, one = number(0), number(0.5), number(1)
    if surrogate == 0:
        for i in range(n):
            u = factor * (read(hs, at + i) - threshold)
            write(scratch, SLOPE + i, half * alpha / (one + u * u))
    elif surrogate == 1:
        # exp by its series, since a loop with a call would not vectorise; beyond `far` nothing is left of it.
        log2e, ln2, far = number(1.4426950408889634), number(0.6931471805599453), number(80)
        for i in range(n):
            u = read(hs, at + i) - threshold
            x = -alpha * abs(u)
            x = x if x > -far else -far
            exponent = whole(x * log2e - half)
            rest, e = x - exponent * ln2, one
            for k in range(13, 0, -1):
                e = one + rest * number(1 / k) * e
            e *= power_of_two(exponent)
            w = alpha * e / ((one + e) * (one + e))
            write(scratch, SLOPE + i, w if u == u else u)
    elif surrogate == 2:
        for i in range(n):
            w = one - alpha * abs(read(hs, at + i) - threshold)
            write(scratch, SLOPE + i, zero if w < zero else alpha * w)
    elif surrogate == 3:
        for i in range(n):
            write(scratch, SLOPE + i, alpha if abs(read(hs, at + i) - threshold) < width else zero)
    else:
        for i in range(n):
            root = one + alpha * abs(read(hs, at + i) - threshold)
            write(scratch, SLOPE + i, one / (root * root))


@inlined(fastmath={"contract"})
def step_back(scratch, hs, at, y, y_at, grad, grad_at, g, g_at, o, n):
    """A line one step back: line GRAD_V from dL/dv of this step to that of the step before, dL/dx to g, and dL/dx and
    dL/dx (y - mean) added to their sums.
    """
    threshold, keep, gain, zero, one = o[THRESHOLD], o[KEEP], o[GAIN], o.dtype.type(0), o.dtype.type(1)
    hard, falls, drop = o[HARD] != zero, o[FALL] != zero, o[DROP]
    for i in range(n):
        h, v = read(hs, at + i), read(scratch, GRAD_V + i)
        s = fire(h, threshold, zero, one)
        # Chosen, not multiplied by 0, which would make a NaN of what is infinite.
        dv_ds = drop - (h if falls else zero)
        dv_dh = one - (s if hard else zero)
        dh = (read(grad, grad_at + i) + v * dv_ds) * read(scratch, SLOPE + i) + v * dv_dh
        write(scratch, GRAD_V + i, dh * keep)
        dx = dh * gain
        write(scratch, GRAD + i, dx)
        write(g, g_at + i, dx)
        write(scratch, TOTAL + i, read(scratch, TOTAL + i) + dx)
        centred = read(y, y_at + i) - read(scratch, MEAN + i)
        write(scratch, PRODUCT + i, read(scratch, PRODUCT + i) + dx * centred)


@inlined(fastmath=SUMS)
def decay_share(scratch, vs, at, y, y_at, residual, residual_at, o, decays, n):
    """What a line adds to dL/d(1/tau) in one step: the sum of dL/dh (rest - v, and + x if the input decays)."""
    total, rest = 0.0, o[REST]
    if decays:
        for i in range(n):
            x = current(scratch, y, y_at, residual, residual_at, i)
            total += read(scratch, GRAD + i) * (rest - read(vs, at + i) + x)
    else:
        for i in range(n):
            total += read(scratch, GRAD + i) * (rest - read(vs, at + i))
    return total / o[GAIN]


@compiled
def backward(
    first,
    last,
    parts,
    geometry,
    steps,
    segment,
    surrogate,
    o,
    parameters,
    y,
    y_step,
    residual,
    residual_step,
    residual_line,
    v0,
    v0_line,
    saved,
    grad,
    grad_step,
    grad_line,
    grad_end,
    grad_end_line,
    g,
    g_step,
    g_line,
    total,
    total_line,
    constant,
    grad_v0,
    begins,
    sums,
    summed,
    grad_decay,
    learnt,
    decays,
    hs,
    vs,
    scratch,
):
    """dL/dx of every step to g, or where `constant` summed over time to `total`; dL/dv0 where v0 `begins`; by part the
    sums of dL/dx and of dL/dx (y - mean) over a channel where `summed`, and dL/d(1/tau) where it is `learnt`.
    """
    size, groups, width, span, run, channels = geometry
    lines, before, zero = groups * -(-span // width), -1, o.dtype.type(0)
    for part in range(first, last):
        final, full = lines * (part + 1) // parts, 0
        for line in range(lines * part // parts, final):
            piece, start, n = bounds(line, size, width, span)
            if piece != before:
                before = piece
                for row in range(3):
                    spread(parameters, row, scratch, row * LINE, piece * width, width, run, channels)
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
                for i in range(count):
                    if learnt:
                        copy(scratch, V, vs, i * LINE, n)
                    t = begin + i
                    step(
                        scratch,
                        y,
                        t * y_step + start,
                        residual,
                        t * residual_step + start * residual_line,
                        hs,
                        i * LINE,
                        False,
                        o,
                        n,
                    )
                for i in range(count - 1, -1, -1):
                    t = begin + i
                    slopes(scratch, hs, i * LINE, surrogate, o, n)
                    step_back(
                        scratch,
                        hs,
                        i * LINE,
                        y,
                        t * y_step + start,
                        grad,
                        t * grad_step + start * grad_line,
                        g,
                        t * g_step + start * g_line,
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
            if full == FLUSH or constant or line + 1 == final or width < span:
                if summed:
                    wide = min(width, span - piece * width)
                    flush(sums, 2 * part, scratch, TOTAL, piece * width, wide, run, channels)
                    flush(sums, 2 * part + 1, scratch, PRODUCT, piece * width, wide, run, channels)
                full = 0


@inlined(fastmath=SUMS)
def deviations(scratch, y, at, n):
    """Sums of y - mean and of its square, element by element of a line."""
    for i in range(n):
        d = read(y, at + i) - read(scratch, FIRST + i)
        write(scratch, SECOND + i, read(scratch, SECOND + i) + d)
        write(scratch, THIRD + i, read(scratch, THIRD + i) + d * d)


@compiled
def moments(first, last, parts, geometry, pivot, y, sums, scratch):
    """By part and channel, the sums of y - pivot and of its square."""
    size, groups, width, span, run, channels = geometry
    lines, before, zero = groups * -(-span // width), -1, pivot.dtype.type(0)
    for part in range(first, last):
        final, full = lines * (part + 1) // parts, 0
        for line in range(lines * part // parts, final):
            piece, start, n = bounds(line, size, width, span)
            if piece != before:
                before = piece
                spread(pivot, 0, scratch, FIRST, piece * width, width, run, channels)
            if full == 0:
                clear(scratch, SECOND, width, zero)
                clear(scratch, THIRD, width, zero)
            deviations(scratch, y, start, n)
            full += 1
            if full == FLUSH or line + 1 == final or width < span:
                wide = min(width, span - piece * width)
                flush(sums, 2 * part, scratch, SECOND, piece * width, wide, run, channels)
                flush(sums, 2 * part + 1, scratch, THIRD, piece * width, wide, run, channels)
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
def norm_backward(first, last, parts, geometry, parameters, g, y, through, grad_y, scratch):
    """scale (g - slope y - offset), the second and third only where `through`; grad_y may be g.

    `parameters` has the rows slope, scale and offset.
    """
    size, groups, width, span, run, channels = geometry
    lines, before = groups * -(-span // width), -1
    for line in range(lines * first // parts, lines * last // parts):
        piece, start, n = bounds(line, size, width, span)
        if piece != before:
            before = piece
            for row in range(3):
                spread(parameters, row, scratch, row * WIDE, piece * width, width, run, channels)
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
def energy(first, last, parts, geometry, steps, x, x_step, of_mean, power, f, scratch):
    """Add to f, over channels, |mean over time of x|^power where `of_mean`, else the mean over time of |x|^power."""
    size, groups, width, span, run, channels = geometry
    pieces, number = -(-span // width), scratch.dtype.type
    # Whole groups, so that no two parts add to the same pixel.
    for line in range(groups * first // parts * pieces, groups * last // parts * pieces):
        _, start, n = bounds(line, size, width, span)
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
def energy_backward(first, last, parts, geometry, steps, x, x_step, of_mean, power, grad, grad_x, scratch):
    """The gradient of x, for one step where `of_mean`."""
    size, groups, width, span, run, channels = geometry
    lines, number = groups * -(-span // width), scratch.dtype.type
    for line in range(lines * first // parts, lines * last // parts):
        _, start, n = bounds(line, size, width, span)
        unfold(grad, scratch, GRAD, start, n, run, channels, number(steps))
        if of_mean:
            add_steps(scratch, V, x, start, x_step, steps, n)
            energy_slope(scratch, TOTAL, scratch, V, power, n)
            copy(scratch, TOTAL, grad_x, start, n)
        else:
            for t in range(steps):
                energy_slope(scratch, TOTAL, x, t * x_step + start, power, n)
                copy(scratch, TOTAL, grad_x, t * size + start, n)
