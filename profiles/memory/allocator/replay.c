/* The allocator of allocator.py once more, for replays of a hundred thousand requests in milliseconds.

   allocator.py is the reading copy: comments there say why, and a property test holds the two equal.
   Blocks are entries of one array; a pool is a sorted array of its free blocks. */

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define MIB ((int64_t)1 << 20)
#define SMALL_BYTES MIB
#define SMALL_SEGMENT_BYTES (2 * MIB)
#define LARGE_SEGMENT_BYTES (20 * MIB)
#define MIN_LARGE_BYTES (10 * MIB)
#define ROUND_LARGE_BYTES (2 * MIB)
#define EXPANDABLE_RANGE_BYTES (LARGE_SEGMENT_BYTES << 20)
#define NO_LIMIT ((int64_t)1 << 62)
#define NONE (-1)
/* A size has its block's stream in its upper bits; each stream has pools of its own. */
#define STREAM_SHIFT 56
#define MAX_STREAMS 3
#define NUM_POOLS (2 * MAX_STREAMS)

typedef struct {
    int64_t address, size;
    int32_t prev, next;
    int8_t pool, is_free, is_mapped;
} Block;

/* A free block: its size, then its address in 512 B, then its index, so that a search reads one array. */
typedef unsigned __int128 Key;
#define INDEX_BITS 24
#define MAX_BLOCKS (1 << INDEX_BITS)

typedef struct {
    Key *free; /* ascending: best fit first */
    int32_t count, room;
    int32_t *holes; /* of an expandable segment: its few parts without memory, by address */
    int32_t num_holes, room_for_holes, has_segment;
} Pool; /* of stream n, 2n: small, 2n + 1: large */

typedef struct {
    Block *blocks;
    int32_t count, room, unused; /* `unused` heads a list of given-back entries, linked by `next` */
    Pool pools[NUM_POOLS];
    int64_t cap, max_split, allocated, reserved, peak_allocated, peak_reserved, next_address, retries;
    int expandable, grows, failed;
} Allocator;

static int32_t new_block(Allocator *a, int64_t address, int64_t size, int pool) {
    int32_t index = a->unused;
    if (index != NONE) {
        a->unused = a->blocks[index].next;
    } else {
        if (a->count == a->room) {
            int32_t room = a->room ? 2 * a->room : 4096;
            Block *moved = room > MAX_BLOCKS ? NULL : realloc(a->blocks, (size_t)room * sizeof(Block));
            if (!moved) { a->failed = 1; return 0; }
            a->blocks = moved;
            a->room = room;
        }
        index = a->count++;
    }
    a->blocks[index] = (Block){address, size, NONE, NONE, (int8_t)pool, 0, 1};
    return index;
}

static void drop_block(Allocator *a, int32_t index) {
    a->blocks[index].next = a->unused;
    a->unused = index;
}

static Key key_of(const Allocator *a, int32_t index) {
    const Block *block = &a->blocks[index];
    return (Key)block->size << 64 | (uint64_t)block->address / 512 << INDEX_BITS | (uint64_t)index;
}

static int64_t size_at(const Pool *pool, int32_t at) { return (int64_t)(pool->free[at] >> 64); }

static int32_t index_at(const Pool *pool, int32_t at) { return (int32_t)(pool->free[at] & (MAX_BLOCKS - 1)); }

/* First position whose block is not before `key`. */
static int32_t position(const Pool *pool, Key key) {
    const Key *from = pool->free;
    for (int32_t left = pool->count; left > 0;) { /* without a branch: which half cannot be foreseen */
        int32_t half = (left + 1) / 2;
        from += half & -(from[half - 1] < key);
        left -= half;
    }
    return (int32_t)(from - pool->free);
}

/* First position whose block is not smaller; of equal ones the lowest address. */
static int32_t first_of(const Pool *pool, int64_t size) { return position(pool, (Key)size << 64); }

static void *grown(Allocator *a, void *array, int32_t room, size_t size) {
    void *moved = realloc(array, (size_t)room * size);
    if (!moved) a->failed = 1;
    return moved ? moved : array;
}

static void shift(Pool *pool, int32_t to, int32_t from, int32_t count) {
    memmove(pool->free + to, pool->free + from, (size_t)count * sizeof(Key));
}

static void add(Allocator *a, int32_t index) {
    Pool *pool = &a->pools[a->blocks[index].pool];
    if (pool->count == pool->room) {
        pool->room = pool->room ? 2 * pool->room : 1024;
        pool->free = grown(a, pool->free, pool->room, sizeof(Key));
        if (a->failed) return;
    }
    Key key = key_of(a, index);
    int32_t at = position(pool, key);
    shift(pool, at + 1, at, pool->count - at);
    pool->free[at] = key;
    pool->count++;
}

static void remove_at(Pool *pool, int32_t at) {
    pool->count--;
    shift(pool, at, at + 1, pool->count - at);
}

/* Remove what is at a position and add `index`, moving only what lies between the two. */
static void replace_at(const Allocator *a, Pool *pool, int32_t at, int32_t index) {
    Key key = key_of(a, index);
    int32_t to = position(pool, key);
    if (to > at) shift(pool, at, at + 1, --to - at);
    else shift(pool, to + 1, to, at - to);
    pool->free[to] = key;
}

static void discard(Allocator *a, int32_t index) {
    Pool *pool = &a->pools[a->blocks[index].pool];
    remove_at(pool, position(pool, key_of(a, index)));
}

static int32_t hole_position(const Allocator *a, const Pool *pool, int64_t address) {
    int32_t at = 0;
    while (at < pool->num_holes && a->blocks[pool->holes[at]].address < address) at++;
    return at;
}

static void add_hole(Allocator *a, int32_t index) {
    Pool *pool = &a->pools[a->blocks[index].pool];
    if (pool->num_holes == pool->room_for_holes) {
        pool->room_for_holes = pool->room_for_holes ? 2 * pool->room_for_holes : 64;
        pool->holes = grown(a, pool->holes, pool->room_for_holes, sizeof(int32_t));
        if (a->failed) return;
    }
    int32_t at = hole_position(a, pool, a->blocks[index].address);
    memmove(pool->holes + at + 1, pool->holes + at, (size_t)(pool->num_holes++ - at) * sizeof(int32_t));
    pool->holes[at] = index;
}

static void discard_hole(Allocator *a, int32_t index) {
    Pool *pool = &a->pools[a->blocks[index].pool];
    int32_t at = hole_position(a, pool, a->blocks[index].address);
    memmove(pool->holes + at, pool->holes + at + 1, (size_t)(--pool->num_holes - at) * sizeof(int32_t));
}

static void absorb_next(Allocator *a, int32_t index) {
    Block *b = &a->blocks[index];
    int32_t after = b->next;
    b->size += a->blocks[after].size;
    b->next = a->blocks[after].next;
    if (b->next != NONE) a->blocks[b->next].prev = index;
    drop_block(a, after);
}

static void reserve(Allocator *a, int64_t bytes) {
    a->reserved += bytes;
    if (a->reserved > a->peak_reserved) a->peak_reserved = a->reserved;
}

static int64_t segment_bytes(int64_t size) {
    if (size <= SMALL_BYTES) return SMALL_SEGMENT_BYTES;
    if (size < MIN_LARGE_BYTES) return LARGE_SEGMENT_BYTES;
    return (size + ROUND_LARGE_BYTES - 1) / ROUND_LARGE_BYTES * ROUND_LARGE_BYTES;
}

static int64_t growth(const Allocator *a, int32_t index) {
    const Block *b = &a->blocks[index];
    return b->size + (b->next != NONE && !a->blocks[b->next].is_mapped ? a->blocks[b->next].size : 0);
}

/* Position of the free block that best fits, NONE where none does. */
static int32_t best_fit(const Allocator *a, const Pool *pool, int64_t size) {
    int32_t at = first_of(pool, size);
    if (at == pool->count) return NONE;
    if (a->expandable)
        while (at + 1 < pool->count && growth(a, index_at(pool, at + 1)) < growth(a, index_at(pool, at))) at++;
    int64_t found = size_at(pool, at);
    if ((size < a->max_split && found >= a->max_split) ||
        (size >= a->max_split && found >= size + LARGE_SEGMENT_BYTES))
        return NONE;
    return at;
}

/* Where the first stretch of free blocks with a hole in it starts that has room. */
static int32_t first_stretch(const Allocator *a, const Pool *pool, int64_t size) {
    for (int32_t i = 0; i < pool->num_holes; i++) {
        int32_t start = pool->holes[i], before = a->blocks[start].prev;
        if (before != NONE && a->blocks[before].is_free) start = before;
        int64_t room = 0;
        for (int32_t behind = start; behind != NONE && a->blocks[behind].is_free && room < size;
             behind = a->blocks[behind].next)
            room += a->blocks[behind].size;
        if (room >= size) return start;
    }
    return NONE;
}

static int32_t map(Allocator *a, int pool_number, int64_t size) {
    Pool *pool = &a->pools[pool_number];
    int64_t page = pool_number % 2 == 0 ? SMALL_SEGMENT_BYTES : LARGE_SEGMENT_BYTES;
    if (!pool->has_segment) {
        int32_t range = new_block(a, a->next_address, EXPANDABLE_RANGE_BYTES, pool_number);
        a->blocks[range].is_free = 1;
        a->blocks[range].is_mapped = 0;
        add_hole(a, range);
        pool->has_segment = 1;
        a->next_address += EXPANDABLE_RANGE_BYTES;
    }
    int32_t index = first_stretch(a, pool, size);
    if (index == NONE) { a->failed = 1; return NONE; }
    if (a->blocks[index].is_mapped) discard(a, index);
    while (!a->failed && (!a->blocks[index].is_mapped || a->blocks[index].size < size)) {
        int32_t hole = a->blocks[index].is_mapped ? a->blocks[index].next : index;
        int64_t wanted = hole == index ? size : size - a->blocks[index].size;
        int64_t mapped = (wanted + page - 1) / page * page;
        if (mapped > a->blocks[hole].size) mapped = a->blocks[hole].size;
        discard_hole(a, hole);
        if (mapped < a->blocks[hole].size) {
            int32_t rest = new_block(a, a->blocks[hole].address + mapped, a->blocks[hole].size - mapped,
                                     pool_number);
            Block *r = &a->blocks[rest];
            r->is_free = 1;
            r->is_mapped = 0;
            r->prev = hole;
            r->next = a->blocks[hole].next;
            if (r->next != NONE) a->blocks[r->next].prev = rest;
            a->blocks[hole].next = rest;
            a->blocks[hole].size = mapped;
            add_hole(a, rest);
        }
        a->blocks[hole].is_mapped = 1;
        reserve(a, mapped);
        if (hole != index) absorb_next(a, index);
        int32_t after = a->blocks[index].next;
        if (after != NONE && a->blocks[after].is_free && a->blocks[after].is_mapped) {
            discard(a, after);
            absorb_next(a, index);
        }
    }
    return index;
}

static int32_t new_segment(Allocator *a, int pool_number, int64_t size) {
    int64_t segment = segment_bytes(size);
    if (a->reserved + segment > a->cap) return NONE;
    if (a->expandable) return map(a, pool_number, size);
    int32_t index = new_block(a, a->next_address, segment, pool_number);
    a->next_address += segment;
    reserve(a, segment);
    return index;
}

static void release(Allocator *a, int32_t index) {
    discard(a, index);
    a->reserved -= a->blocks[index].size;
    drop_block(a, index);
}

static void release_oversize(Allocator *a, Pool *pool, int64_t size) {
    int32_t at = first_of(pool, size > a->max_split ? size : a->max_split);
    if (at < pool->count) {
        release(a, index_at(pool, at));
        return;
    }
    for (int64_t released = 0; pool->count && released < size;) {
        int32_t index = index_at(pool, pool->count - 1);
        if (a->blocks[index].size < a->max_split) return;
        released += a->blocks[index].size;
        release(a, index);
    }
}

static void unmap(Allocator *a, int32_t index) {
    Block block = a->blocks[index];
    int64_t page = block.pool % 2 == 0 ? SMALL_SEGMENT_BYTES : LARGE_SEGMENT_BYTES;
    int64_t first = (block.address + page - 1) / page * page;
    int64_t end = block.address + block.size, last = end / page * page;
    if (last <= first) return;
    discard(a, index);
    int64_t starts[3] = {block.address, first, last}, stops[3] = {first, last, end};
    int32_t made[3], count = 0, left = block.prev, hole = NONE;
    for (int i = 0; i < 3; i++) {
        if (stops[i] <= starts[i]) continue;
        int32_t piece = new_block(a, starts[i], stops[i] - starts[i], block.pool);
        a->blocks[piece].is_free = 1;
        a->blocks[piece].is_mapped = i != 1;
        a->blocks[piece].prev = left;
        if (left != NONE) a->blocks[left].next = piece;
        if (i == 1) hole = piece;
        made[count++] = left = piece;
    }
    a->blocks[left].next = block.next;
    if (block.next != NONE) a->blocks[block.next].prev = left;
    drop_block(a, index);
    for (int i = 0; i < count; i++)
        if (made[i] != hole) add(a, made[i]);
    int32_t after = a->blocks[hole].next, before = a->blocks[hole].prev;
    if (after != NONE && !a->blocks[after].is_mapped) {
        discard_hole(a, after);
        absorb_next(a, hole);
    }
    if (before != NONE && !a->blocks[before].is_mapped) absorb_next(a, before);
    else add_hole(a, hole);
    a->reserved -= last - first;
}

static void empty_cache(Allocator *a) {
    for (int p = 0; p < NUM_POOLS; p++) {
        Pool *pool = &a->pools[p];
        int32_t count = pool->count;
        Key *cached = malloc((size_t)(count ? count : 1) * sizeof(Key));
        if (!cached) { a->failed = 1; return; }
        if (count) memcpy(cached, pool->free, (size_t)count * sizeof(Key));
        for (int32_t i = 0; i < count && !a->failed; i++) {
            int32_t index = (int32_t)(cached[i] & (MAX_BLOCKS - 1));
            if (a->expandable) unmap(a, index);
            else if (a->blocks[index].prev == NONE && a->blocks[index].next == NONE) release(a, index);
        }
        free(cached);
    }
}

/* Return a block that is no longer in its pool for a request that no free block serves, NONE where none. */
static int32_t make_room(Allocator *a, int pool_number, int64_t size) {
    int32_t index = new_segment(a, pool_number, size);
    if (index != NONE || a->failed) return index;
    a->retries++;
    if (a->max_split != NO_LIMIT && !a->expandable) {
        release_oversize(a, &a->pools[pool_number], size);
        index = new_segment(a, pool_number, size);
    }
    if (index == NONE) {
        empty_cache(a);
        index = new_segment(a, pool_number, size);
    }
    if (index == NONE && a->grows) {
        a->cap = a->reserved + segment_bytes(size);
        index = new_segment(a, pool_number, size);
    }
    return index;
}

/* Return a live block, NONE where the cap forbids it. */
static int32_t take(Allocator *a, int64_t request) {
    int64_t bytes = request & (((int64_t)1 << STREAM_SHIFT) - 1);
    int64_t size = (bytes + 511) / 512 * 512;
    if (size == 0) size = 512;
    int pool_number = 2 * (int)(request >> STREAM_SHIFT) + (size <= SMALL_BYTES ? 0 : 1);
    Pool *pool = &a->pools[pool_number];
    int32_t at = best_fit(a, pool, size);
    int32_t index = at != NONE ? index_at(pool, at) : make_room(a, pool_number, size);
    if (index == NONE || a->failed) return NONE;
    int64_t remaining = a->blocks[index].size - size;
    int splits = pool_number % 2 == 0 || a->expandable ? remaining >= 512
                                                   : size < a->max_split && remaining > SMALL_BYTES;
    if (splits) {
        int32_t rest = new_block(a, a->blocks[index].address + size, remaining, pool_number);
        Block *b = &a->blocks[index], *r = &a->blocks[rest];
        r->prev = index;
        r->next = b->next;
        if (r->next != NONE) a->blocks[r->next].prev = rest;
        b->next = rest;
        b->size = size;
        r->is_free = 1;
        if (at != NONE) replace_at(a, pool, at, rest);
        else add(a, rest);
    } else if (at != NONE) {
        remove_at(pool, at);
    }
    a->blocks[index].is_free = 0;
    a->allocated += a->blocks[index].size;
    if (a->allocated > a->peak_allocated) a->peak_allocated = a->allocated;
    return index;
}

static int is_cached(const Allocator *a, int32_t index) {
    return index != NONE && a->blocks[index].is_free && a->blocks[index].is_mapped;
}

static void give_back(Allocator *a, int32_t index) {
    a->allocated -= a->blocks[index].size;
    Pool *pool = &a->pools[a->blocks[index].pool];
    int32_t before = a->blocks[index].prev, after = a->blocks[index].next, at = NONE;
    if (is_cached(a, after)) {
        at = position(pool, key_of(a, after));
        absorb_next(a, index);
    }
    if (is_cached(a, before)) {
        if (at != NONE) remove_at(pool, at);
        at = position(pool, key_of(a, before));
        absorb_next(a, before);
        index = before;
    }
    a->blocks[index].is_free = 1;
    if (at != NONE) replace_at(a, pool, at, index);
    else add(a, index);
}

/* Run `events` (n: block n is born, ~n: it dies) with `sizes` of blocks; caps below 0 are none.

   `grows`: a request that the cap forbids raises the cap by what it lacks.  Returns 0, or 1 where the cap
   was passed, or -1 where this machine has no memory left.  `result`: peak allocated, peak reserved, cap at
   the end, retries, and what is reserved at the end. */
int replay(const int32_t *events, int64_t num_events, const int64_t *sizes, int64_t num_blocks, int64_t cap,
           int64_t max_split, int expandable, int grows, int64_t *result) {
    Allocator a = {0};
    a.cap = cap < 0 ? NO_LIMIT : cap;
    a.max_split = max_split < 0 ? NO_LIMIT : max_split;
    a.expandable = expandable;
    a.grows = grows;
    a.unused = NONE;
    int32_t *live = malloc((size_t)(num_blocks ? num_blocks : 1) * sizeof(int32_t));
    int status = live ? 0 : -1;
    for (int64_t i = 0; i < num_events && status == 0; i++) {
        int32_t event = events[i];
        if (event >= 0) {
            live[event] = take(&a, sizes[event]);
            if (live[event] == NONE) status = 1;
        } else {
            give_back(&a, live[~event]);
        }
        if (a.failed) status = -1;
    }
    result[0] = a.peak_allocated;
    result[1] = a.peak_reserved;
    result[2] = a.cap;
    result[3] = a.retries;
    result[4] = a.reserved;
    free(live);
    free(a.blocks);
    for (int p = 0; p < NUM_POOLS; p++) {
        free(a.pools[p].free);
        free(a.pools[p].holes);
    }
    return status;
}
