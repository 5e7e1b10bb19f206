// The few classes of ai.onnxruntime that EcqxModel.kt uses, and behind them a runtime that knows one operator: Identity.
package ai.onnxruntime

import java.nio.ByteBuffer

enum class OnnxJavaType { FLOAT, DOUBLE, INT8, INT16, INT32, INT64, BOOL, STRING, UINT8, UNKNOWN }

class TensorInfo(val type: OnnxJavaType, val shape: LongArray)

interface OnnxValue : AutoCloseable

class OnnxTensor private constructor(val info: TensorInfo, private val data: ByteBuffer) : OnnxValue {
    val byteBuffer: ByteBuffer
        get() {
            val copy = ByteBuffer.allocate(data.limit())
            for (i in 0 until data.limit()) copy.put(i, data.get(i))
            return copy
        }

    override fun close() {}

    companion object {
        fun createTensor(environment: OrtEnvironment, data: ByteBuffer, shape: LongArray, type: OnnxJavaType) =
            OnnxTensor(TensorInfo(type, shape), data)
    }
}

class OrtEnvironment {
    fun createSession(model: ByteArray, options: OrtSession.SessionOptions): OrtSession {
        if (!String(model, Charsets.ISO_8859_1).contains("Identity")) throw IllegalArgumentException("this runtime knows Identity only")
        return OrtSession()
    }

    companion object {
        fun getEnvironment() = OrtEnvironment()
    }
}

class OrtSession : AutoCloseable {
    class SessionOptions {
        fun setIntraOpNumThreads(count: Int) {}
    }

    class Result(private val values: Map<String, OnnxValue>) : AutoCloseable, Iterable<Map.Entry<String, OnnxValue>> {
        override fun iterator() = values.entries.iterator()
        override fun close() {}
    }

    fun run(inputs: Map<String, OnnxTensor>) = Result(mapOf("y" to inputs.values.single()))

    override fun close() {}
}
