"""Triton kernels of the forward pass of monarch_attention.

`right_kernel` is the R-step, `left_kernel` the L-step with the output, `average_kernel` the averaged queries of the
next iteration. A "line" is a query tile and a column, a "key row" a key tile and a row. Between the kernels, three
results lie in device memory:

| result | shape | |
|---|---|---|
| `a_l` | [G, lines, key rows, D], dtype of the input | `sum_l R K`; the scale is applied to the logits |
| `y` | [G, lines, key rows, D], dtype of the input | `sum_l R V` |
| `c_l` | [G, lines, key rows], float32 | `sum_l R log2 R`; +inf for a key row without a valid key |

G counts (batch row, head), lines Ta * b2 in the order (tile, column), key rows Tf * b1 in the order (tile, row): the
key rows of a line are contiguous, so that the L-step is the inner loop of FlashAttention. All logits are to base 2.
"""

from __future__ import annotations

from hf_efficient.kernels.triton_language import HAVE_TRITON, tl, triton

if HAVE_TRITON:

    @triton.jit
    def tile_offset(tile, tiles_h, tiles_w, stride_f, stride_h, stride_w):
        """Token offset of a tile."""
        in_frame = tile % (tiles_h * tiles_w)
        frame = tile // (tiles_h * tiles_w)
        return frame * stride_f + in_frame // tiles_w * stride_h + in_frame % tiles_w * stride_w

    @triton.jit
    def inner_offset(index, inner, stride_outer, stride_inner):
        """Token offset of a row or column within its tile."""
        return index // inner * stride_outer + index % inner * stride_inner

    @triton.jit
    def attended(key_mask, token, tokens, inside, IS_SEQUENCE: tl.constexpr, HAS_MASK: tl.constexpr):
        """Which of the tokens are neither padding nor masked; `inside` is False past the end of a tile."""
        if IS_SEQUENCE:
            inside = inside & (token >= 0) & (token < tokens)
        if HAS_MASK:
            inside = inside & (tl.load(key_mask + token, mask=inside, other=0) != 0)
        return inside

    @triton.jit
    def load_tokens(source, token, valid, stride, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
        """Tokens [M] of one head, [M, BLOCK_D]; zeros where not valid and past the head_dim."""
        offs_d = tl.arange(0, BLOCK_D)
        ptrs = source + token.to(tl.int64)[:, None] * stride + offs_d[None, :]
        return tl.load(ptrs, mask=valid[:, None] & (offs_d < HEAD_DIM)[None, :], other=0.0)

    @triton.jit
    def load_keys(
        source,
        batch,
        head,
        start,
        token,
        valid,
        stride_b,
        stride_h,
        stride_n,
        HEAD_DIM: tl.constexpr,
        BLOCK_D: tl.constexpr,
        ROWS: tl.constexpr,
        USE_TMA: tl.constexpr,
    ):
        """A block of a key row, [ROWS, BLOCK_D]: the tokens from `start` by TMA, or those at `token`."""
        if USE_TMA:
            return source.load([batch, head, start, 0]).reshape(ROWS, BLOCK_D)
        else:
            base = source + batch.to(tl.int64) * stride_b + head.to(tl.int64) * stride_h
            return load_tokens(base, token, valid, stride_n, HEAD_DIM, BLOCK_D)

    @triton.jit
    def store_lines(target, value, valid, stride, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr):
        """Write a result [BLOCK_M, BLOCK_D] for one key row of consecutive lines, `stride` elements apart."""
        offs_d = tl.arange(0, BLOCK_D)
        # 32-bit offsets from one pointer: 64-bit pointers of all rows would take too many registers.
        offsets = tl.arange(0, BLOCK_M)[:, None] * stride + offs_d[None, :]
        mask = valid[:, None] & (offs_d < HEAD_DIM)[None, :]
        tl.store(target + offsets, value.to(target.dtype.element_ty), mask=mask)

    # Grid (b1 * blocks of lines, G, parts of the key tiles): a program holds BLOCK_M lines of one row, and passes over
    # key tiles; with LOOP_ROWS, of a single tile, over rows: (parts of the rows * blocks of lines, G). z are logits,
    # m_i their maximum, l_i the sum of exponentials p, e_i the sum of p * log2 p, so that
    # sum R log2 R = e_i / l_i - log2(l_i).
    @triton.jit(
        do_not_specialize=["first_group", "query_tokens", "key_tokens", "key_tiles", "query_tiles", "items_per_program"]
    )
    def right_kernel(
        q,
        k,
        v,
        k_tail,
        v_tail,
        a_l,
        y,
        c_l,
        key_mask,
        pad_query,
        averaged,
        lse_r,
        first_group,
        heads,
        query_tokens,
        key_tokens,
        qk_scale,
        q_stride_b,
        q_stride_h,
        q_stride_n,
        k_stride_b,
        k_stride_h,
        k_stride_n,
        v_stride_b,
        v_stride_h,
        v_stride_n,
        mask_stride_b,
        query_tiles,
        key_tiles,
        rows,
        columns,
        tiles_h,
        tiles_w,
        tile_stride_f,
        tile_stride_h,
        tile_stride_w,
        row_inner,
        row_stride_outer,
        row_stride_inner,
        column_inner,
        column_stride_outer,
        column_stride_inner,
        shift,
        causal_tiles,
        items_per_program,
        LOOP_ROWS: tl.constexpr,
        HEAD_DIM: tl.constexpr,
        BLOCK_D: tl.constexpr,
        BLOCK_M: tl.constexpr,
        BLOCK_L: tl.constexpr,
        TAIL_L: tl.constexpr,
        STREAM: tl.constexpr,
        IS_SEQUENCE: tl.constexpr,
        HAS_MASK: tl.constexpr,
        PAD_MEAN: tl.constexpr,
        AVERAGED: tl.constexpr,
        WITH_Y: tl.constexpr,
        WITH_LSE: tl.constexpr,
        USE_TMA: tl.constexpr,
        NUM_STAGES: tl.constexpr,
    ):
        lines = query_tiles * columns
        key_rows = key_tiles * rows
        # Rows first: programs that run together write neighbouring key rows of a line.
        if LOOP_ROWS:
            chunks = tl.cdiv(rows, items_per_program)
            first = tl.program_id(0) % chunks * items_per_program
            start_line = tl.program_id(0) // chunks * BLOCK_M
            row = first
        else:
            row = tl.program_id(0) % rows
            start_line = tl.program_id(0) // rows * BLOCK_M
            first = tl.program_id(2) * items_per_program
        group = tl.program_id(1)
        head = (first_group + group) % heads
        batch = (first_group + group) // heads
        if HAS_MASK:
            key_mask += batch.to(tl.int64) * mask_stride_b

        line = start_line + tl.arange(0, BLOCK_M)
        column = line % columns
        query_tile = line // columns
        row_offset = shift + inner_offset(row, row_inner, row_stride_outer, row_stride_inner)
        offs_d = tl.arange(0, BLOCK_D)
        first_row = (group.to(tl.int64) * lines + start_line) * key_rows
        if not AVERAGED and not LOOP_ROWS:
            q_token = row_offset + inner_offset(column, column_inner, column_stride_outer, column_stride_inner)
            q_token += tile_offset(query_tile, tiles_h, tiles_w, tile_stride_f, tile_stride_h, tile_stride_w)
            q_valid = attended(key_mask, q_token, query_tokens, line < lines, IS_SEQUENCE, HAS_MASK)
            q_base = q + batch.to(tl.int64) * q_stride_b + head.to(tl.int64) * q_stride_h
            q_tile = load_tokens(q_base, q_token, q_valid, q_stride_n, HEAD_DIM, BLOCK_D)
            if PAD_MEAN:
                mean = (group.to(tl.int64) * columns + column)[:, None] * HEAD_DIM + offs_d[None, :]
                mean = tl.load(
                    pad_query + mean,
                    mask=((line < lines) & ~q_valid)[:, None] & (offs_d < HEAD_DIM)[None, :],
                    other=0.0,
                )
                q_tile = tl.where(q_valid[:, None], q_tile, mean)

        items = rows if LOOP_ROWS else key_tiles
        if causal_tiles > 0:
            last_tile = tl.minimum(start_line + BLOCK_M - 1, lines - 1) // columns
            items = (last_tile // causal_tiles + 1) * causal_tiles
        end = tl.minimum(items, first + items_per_program)
        for item in tl.range(first, end, num_stages=NUM_STAGES):
            key_tile = item
            if LOOP_ROWS:
                key_tile = 0
                row = item
                row_offset = shift + item * row_stride_inner
                q_tile = q.load([batch, head, row_offset + start_line, 0]).reshape(BLOCK_M, BLOCK_D)
            start = row_offset + tile_offset(key_tile, tiles_h, tiles_w, tile_stride_f, tile_stride_h, tile_stride_w)
            key_row = key_tile * rows + row
            if AVERAGED:
                offsets = tl.arange(0, BLOCK_M)[:, None] * (key_rows * HEAD_DIM) + offs_d[None, :]
                ptrs = averaged + (first_row + key_row) * HEAD_DIM + offsets
                q_tile = tl.load(ptrs, mask=(line < lines)[:, None] & (offs_d < HEAD_DIM)[None, :], other=0.0)
            m_i = tl.full([BLOCK_M], -1e30, dtype=tl.float32)
            l_i = tl.zeros([BLOCK_M], dtype=tl.float32)
            e_i = tl.zeros([BLOCK_M], dtype=tl.float32)
            if STREAM:
                a_acc = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
                y_acc = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
                for start_l in tl.range(0, columns, BLOCK_L, num_stages=NUM_STAGES):
                    offs_l = start_l + tl.arange(0, BLOCK_L)
                    token = start + inner_offset(offs_l, column_inner, column_stride_outer, column_stride_inner)
                    valid = attended(key_mask, token, key_tokens, offs_l < columns, IS_SEQUENCE, HAS_MASK)
                    k_tile = load_keys(
                        k, batch, head, start + start_l, token, valid, k_stride_b, k_stride_h, k_stride_n,
                        HEAD_DIM, BLOCK_D, BLOCK_L, USE_TMA,
                    )  # fmt: skip
                    z = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee") * qk_scale
                    z = tl.where(valid[None, :], z, -1e30)
                    m_ij = tl.maximum(m_i, tl.max(z, axis=1))
                    alpha = tl.exp2(m_i - m_ij)
                    z = z - m_ij[:, None]
                    p = tl.where(valid[None, :], tl.exp2(z), 0.0)
                    e_i = alpha * (e_i + l_i * (m_i - m_ij)) + tl.sum(p * z, axis=1)
                    l_i = alpha * l_i + tl.sum(p, axis=1)
                    m_i = m_ij
                    p = p.to(k_tile.dtype)
                    a_acc = tl.dot(p, k_tile, a_acc * alpha[:, None], input_precision="ieee")
                    if WITH_Y:
                        v_tile = load_keys(
                            v, batch, head, start + start_l, token, valid, v_stride_b, v_stride_h, v_stride_n,
                            HEAD_DIM, BLOCK_D, BLOCK_L, USE_TMA,
                        )  # fmt: skip
                        y_acc = tl.dot(p, v_tile, y_acc * alpha[:, None], input_precision="ieee")
                dead = l_i == 0.0
                inverse = tl.where(dead, 0.0, 1.0 / l_i)
                a_acc *= inverse[:, None]
                y_acc *= inverse[:, None]
            else:
                offs_l = tl.arange(0, BLOCK_L)
                token = start + inner_offset(offs_l, column_inner, column_stride_outer, column_stride_inner)
                valid = attended(key_mask, token, key_tokens, offs_l < columns, IS_SEQUENCE, HAS_MASK)
                k_tile = load_keys(
                    k, batch, head, start, token, valid, k_stride_b, k_stride_h, k_stride_n,
                    HEAD_DIM, BLOCK_D, BLOCK_L, USE_TMA,
                )  # fmt: skip
                z = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee")
                z = tl.where(valid[None, :], z, -1e30)
                m_i = tl.max(z, axis=1)
                if TAIL_L > 0:
                    offs_t = BLOCK_L + tl.arange(0, TAIL_L)
                    token_t = start + inner_offset(offs_t, column_inner, column_stride_outer, column_stride_inner)
                    valid_t = attended(key_mask, token_t, key_tokens, offs_t < columns, IS_SEQUENCE, HAS_MASK)
                    kt_tile = load_keys(
                        k_tail, batch, head, start + BLOCK_L, token_t, valid_t, k_stride_b, k_stride_h, k_stride_n,
                        HEAD_DIM, BLOCK_D, TAIL_L, USE_TMA,
                    )  # fmt: skip
                    zt = tl.dot(q_tile, tl.trans(kt_tile), input_precision="ieee")
                    zt = tl.where(valid_t[None, :], zt, -1e30)
                    m_i = tl.maximum(m_i, tl.max(zt, axis=1))
                    zt = zt * qk_scale - (m_i * qk_scale)[:, None]
                    pt = tl.exp2(zt)
                    l_i = tl.sum(pt, axis=1)
                    e_i = tl.sum(pt * zt, axis=1)
                z = z * qk_scale - (m_i * qk_scale)[:, None]
                p = tl.exp2(z)
                l_i += tl.sum(p, axis=1)
                e_i += tl.sum(p * z, axis=1)
                # Without a valid key every logit is the maximum.
                dead = m_i < -5e29
                inverse = tl.where(dead, 0.0, 1.0 / l_i)
                p = (p * inverse[:, None]).to(k_tile.dtype)
                a_acc = tl.dot(p, k_tile, input_precision="ieee")
                if TAIL_L > 0:
                    pt = (pt * inverse[:, None]).to(k_tile.dtype)
                    a_acc = tl.dot(pt, kt_tile, a_acc, input_precision="ieee")
                # Before the next product, so that its registers are free again.
                target = (first_row + key_row) * HEAD_DIM
                store_lines(a_l + target, a_acc, line < lines, key_rows * HEAD_DIM, HEAD_DIM, BLOCK_D, BLOCK_M)
                if WITH_Y:
                    v_tile = load_keys(
                        v, batch, head, start, token, valid, v_stride_b, v_stride_h, v_stride_n,
                        HEAD_DIM, BLOCK_D, BLOCK_L, USE_TMA,
                    )  # fmt: skip
                    y_acc = tl.dot(p, v_tile, input_precision="ieee")
                    if TAIL_L > 0:
                        vt_tile = load_keys(
                            v_tail, batch, head, start + BLOCK_L, token_t, valid_t, v_stride_b, v_stride_h,
                            v_stride_n, HEAD_DIM, BLOCK_D, TAIL_L, USE_TMA,
                        )  # fmt: skip
                        y_acc = tl.dot(pt, vt_tile, y_acc, input_precision="ieee")
            entropy = tl.where(dead, float("inf"), e_i * inverse - tl.log2(tl.where(dead, 1.0, l_i)))
            tl.store(c_l + first_row + key_row + tl.arange(0, BLOCK_M) * key_rows, entropy, mask=line < lines)
            if WITH_LSE:
                lse = m_i * (1.0 if STREAM else qk_scale) + tl.log2(tl.where(dead, 1.0, l_i))
                offsets = tl.arange(0, BLOCK_M) * key_rows
                tl.store(lse_r + first_row + key_row + offsets, tl.where(dead, float("inf"), lse), mask=line < lines)
            target = (first_row + key_row) * HEAD_DIM
            if STREAM:
                store_lines(a_l + target, a_acc, line < lines, key_rows * HEAD_DIM, HEAD_DIM, BLOCK_D, BLOCK_M)
            if WITH_Y:
                store_lines(y + target, y_acc, line < lines, key_rows * HEAD_DIM, HEAD_DIM, BLOCK_D, BLOCK_M)

    # Grid (blocks of b1 * lines, G), the last lines first, whose a_l and y may still be in the L2 cache: a program
    # holds BLOCK_M query rows of one line. FlashAttention's online softmax over the key rows; m_i, l_i, acc as there.
    @triton.jit(do_not_specialize=["first_group", "query_tokens", "key_tiles", "query_tiles"])
    def left_kernel(
        out,
        lse,
        q,
        a_l,
        y,
        c_l,
        key_mask,
        first_group,
        heads,
        query_tokens,
        qk_scale,
        q_stride_b,
        q_stride_h,
        q_stride_n,
        mask_stride_b,
        query_tiles,
        key_tiles,
        rows,
        columns,
        tiles_h,
        tiles_w,
        tile_stride_f,
        tile_stride_h,
        tile_stride_w,
        row_inner,
        row_stride_outer,
        row_stride_inner,
        column_inner,
        column_stride_outer,
        column_stride_inner,
        shift,
        causal_tiles,
        HEAD_DIM: tl.constexpr,
        BLOCK_D: tl.constexpr,
        BLOCK_M: tl.constexpr,
        BLOCK_N: tl.constexpr,
        IS_SEQUENCE: tl.constexpr,
        HAS_MASK: tl.constexpr,
        WITH_OUT: tl.constexpr,
        WITH_LSE: tl.constexpr,
        NUM_STAGES: tl.constexpr,
    ):
        lines = query_tiles * columns
        key_rows = key_tiles * rows
        blocks_m = tl.cdiv(rows, BLOCK_M)
        index = tl.num_programs(0) - 1 - tl.program_id(0)
        line = index // blocks_m
        group = tl.num_programs(1) - 1 - tl.program_id(1)
        head = (first_group + group) % heads
        batch = (first_group + group) // heads
        if HAS_MASK:
            key_mask += batch.to(tl.int64) * mask_stride_b
        row = index % blocks_m * BLOCK_M + tl.arange(0, BLOCK_M)
        query_tile = line // columns
        token = shift + tile_offset(query_tile, tiles_h, tiles_w, tile_stride_f, tile_stride_h, tile_stride_w)
        token += inner_offset(line % columns, column_inner, column_stride_outer, column_stride_inner)
        token += inner_offset(row, row_inner, row_stride_outer, row_stride_inner)
        inside = row < rows
        if IS_SEQUENCE:
            inside = inside & (token >= 0) & (token < query_tokens)
        valid = attended(key_mask, token, query_tokens, inside, IS_SEQUENCE, HAS_MASK)
        q_base = q + batch.to(tl.int64) * q_stride_b + head.to(tl.int64) * q_stride_h
        q_tile = load_tokens(q_base, token, valid, q_stride_n, HEAD_DIM, BLOCK_D)

        end_row = key_rows
        if causal_tiles > 0:
            end_row = (query_tile // causal_tiles + 1) * causal_tiles * rows
        first = (group.to(tl.int64) * lines + line) * key_rows
        c_l += first
        a_l += first * HEAD_DIM
        y += first * HEAD_DIM
        offs_n = tl.arange(0, BLOCK_N)
        offs_d = tl.arange(0, BLOCK_D)
        offsets = offs_n[:, None] * HEAD_DIM + offs_d[None, :]
        m_i = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
        l_i = tl.zeros([BLOCK_M], dtype=tl.float32)
        acc = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
        for start_n in tl.range(0, end_row, BLOCK_N, num_stages=NUM_STAGES):
            in_rows = start_n + offs_n < end_row
            in_tile = in_rows[:, None] & (offs_d < HEAD_DIM)[None, :]
            a_tile = tl.load(a_l + start_n * HEAD_DIM + offsets, mask=in_tile, other=0.0)
            c_i = tl.load(c_l + start_n + offs_n, mask=in_rows, other=float("inf"))
            u = tl.dot(q_tile, tl.trans(a_tile), input_precision="ieee") * qk_scale - c_i[None, :]
            m_ij = tl.maximum(m_i, tl.max(u, axis=1))
            # Until a valid key row is found the maximum is -inf, and -inf - -inf is NaN.
            m_safe = tl.where(m_ij == float("-inf"), 0.0, m_ij)
            p = tl.exp2(u - m_safe[:, None])
            alpha = tl.exp2(m_i - m_safe)
            l_i = l_i * alpha + tl.sum(p, axis=1)
            m_i = m_ij
            if WITH_OUT:
                y_tile = tl.load(y + start_n * HEAD_DIM + offsets, mask=in_tile, other=0.0)
                acc = tl.dot(p.to(y_tile.dtype), y_tile, acc * alpha[:, None], input_precision="ieee")
        l_safe = tl.where(l_i > 0.0, l_i, 1.0)
        if WITH_OUT:
            acc = tl.where(valid[:, None], acc / l_safe[:, None], 0.0)
            # Token of the output [B, Nq, H, D], which is what a model's output projection reads.
            out_row = (batch.to(tl.int64) * query_tokens + token) * heads + head
            tl.store(
                out + out_row[:, None] * HEAD_DIM + offs_d[None, :],
                acc.to(out.dtype.element_ty),
                mask=inside[:, None] & (offs_d < HEAD_DIM)[None, :],
            )
        if WITH_LSE:
            # A masked query takes part in nothing: exp2(u - inf) is 0.
            value = tl.where(valid & (l_i > 0.0), m_i + tl.log2(l_safe), float("inf"))
            tl.store(lse + (group.to(tl.int64) * lines + line) * rows + row, value, mask=row < rows)

    # Grid (blocks of key rows * lines, G): the averaged queries of BLOCK_M key rows of a line, an attention over the
    # line's query rows: W = softmax_i(log L) with log2 L = u - lse, where the entropy is constant over i. Zero where no
    # query of the line is valid. Overwrites `a_l`.
    @triton.jit(do_not_specialize=["first_group", "query_tokens", "key_tiles", "query_tiles"])
    def average_kernel(
        a_l,
        lse,
        q,
        first_group,
        heads,
        query_tokens,
        qk_scale,
        q_stride_b,
        q_stride_h,
        q_stride_n,
        query_tiles,
        key_tiles,
        rows,
        columns,
        tiles_h,
        tiles_w,
        tile_stride_f,
        tile_stride_h,
        tile_stride_w,
        row_inner,
        row_stride_outer,
        row_stride_inner,
        column_inner,
        column_stride_outer,
        column_stride_inner,
        shift,
        HEAD_DIM: tl.constexpr,
        BLOCK_D: tl.constexpr,
        BLOCK_M: tl.constexpr,
        BLOCK_N: tl.constexpr,
        IS_SEQUENCE: tl.constexpr,
        NUM_STAGES: tl.constexpr,
    ):
        lines = query_tiles * columns
        key_rows = key_tiles * rows
        blocks_m = tl.cdiv(key_rows, BLOCK_M)
        line = tl.program_id(0) // blocks_m
        group = tl.program_id(1)
        head = (first_group + group) % heads
        batch = (first_group + group) // heads
        start = shift + tile_offset(line // columns, tiles_h, tiles_w, tile_stride_f, tile_stride_h, tile_stride_w)
        start += inner_offset(line % columns, column_inner, column_stride_outer, column_stride_inner)
        q_base = q + batch.to(tl.int64) * q_stride_b + head.to(tl.int64) * q_stride_h
        key_row = tl.program_id(0) % blocks_m * BLOCK_M + tl.arange(0, BLOCK_M)
        offs_d = tl.arange(0, BLOCK_D)
        a_ptrs = ((group.to(tl.int64) * lines + line) * key_rows + key_row)[:, None] * HEAD_DIM + offs_d[None, :]
        in_tile = (key_row < key_rows)[:, None] & (offs_d < HEAD_DIM)[None, :]
        a_tile = tl.load(a_l + a_ptrs, mask=in_tile, other=0.0)
        lse += (group.to(tl.int64) * lines + line) * rows
        m_i = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
        l_i = tl.zeros([BLOCK_M], dtype=tl.float32)
        acc = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
        for start_n in tl.range(0, rows, BLOCK_N, num_stages=NUM_STAGES):
            row = start_n + tl.arange(0, BLOCK_N)
            lse_i = tl.load(lse + row, mask=row < rows, other=float("inf"))
            valid = lse_i < float("inf")
            token = start + inner_offset(row, row_inner, row_stride_outer, row_stride_inner)
            q_tile = load_tokens(q_base, token, valid, q_stride_n, HEAD_DIM, BLOCK_D)
            w = tl.dot(a_tile, tl.trans(q_tile), input_precision="ieee") * qk_scale - lse_i[None, :]
            m_ij = tl.maximum(m_i, tl.max(w, axis=1))
            m_safe = tl.where(m_ij == float("-inf"), 0.0, m_ij)
            p = tl.exp2(w - m_safe[:, None])
            alpha = tl.exp2(m_i - m_safe)
            l_i = l_i * alpha + tl.sum(p, axis=1)
            acc = tl.dot(p.to(q_tile.dtype), q_tile, acc * alpha[:, None], input_precision="ieee")
            m_i = m_ij
        acc = acc / tl.where(l_i > 0.0, l_i, 1.0)[:, None]
        tl.store(a_l + a_ptrs, acc.to(a_l.dtype.element_ty), mask=in_tile)

else:
    # The files of launchers and gradients import these names, and must load without Triton.
    attended = inner_offset = load_tokens = tile_offset = right_kernel = left_kernel = average_kernel = None
